"""What is needed to build and to prove the plane's rules, dashboards and runbooks; no host runs any of it."""
