"""Engine, tenant-bound sessions and table models."""
