#!/usr/bin/env bash
# Every test of the project, the fast ones first: ./plane test [--fast] [SCENARIO…]
#
# --fast leaves out what needs lab hosts. Naming Molecule scenarios runs only them, and `compose` is the name of
# compose.yaml's tests among them. A full run that executed fewer tests than scripts/expected-tests says has failed,
# whatever the others said. Logs, reports and what was seen of the plane are left in evidence/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export EVIDENCE=$PWD/evidence
export SKELDIR_LOGS=$EVIDENCE/log
# A lab of its own: one that is up stays as it is.
SKELDIR_LAB=skeldir-test-$(cksum <<<"$PWD" | cut -c1-6)
export SKELDIR_LAB
rm -rf "$EVIDENCE"
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

FAST=
[ "${1:-}" != --fast ] || { FAST=yes && shift; }
SCENARIOS=("$@")
COUNTING=(--any-number)
STAGES=$EVIDENCE/stages.txt
touch "$STAGES"

# check NAME TEXT COMMAND…: a stage whose outcome is written down, so that the next ones still run.
check() {
  local text=$2 began=$SECONDS outcome=ok
  STAGE_TAIL=60 stage "$@" || outcome=FAILED
  printf '%-58s %-7s %4d s\n' "$text" "$outcome" $((SECONDS - began)) >>"$STAGES"
}

failed() { grep -c ' FAILED ' "$STAGES" || true; }

# beside COMMAND…: go on with it in the background, in a process group of its own, which `finish` ends.
BESIDE=()
beside() {
  set -m
  "$@" &
  set +m
  BESIDE+=($!)
}

# Not for every child of this shell: the Docker engine may be one.
wait_for_those_beside() {
  local group
  for group in "${BESIDE[@]}"; do wait "$group" || true; done
  BESIDE=()
}

python_style() { ruff format --check . && ruff check .; }

python_types() { mypy && lint-imports; }

shell_style() {
  local files
  mapfile -t files < <(git ls-files --cached --others --exclude-standard -- ":!*.j2" |
    xargs grep -lE '^#!.*\b(ba)?sh$|^# shellcheck shell=' --)
  shellcheck --external-sources "${files[@]}"
}

locks_are_current() {
  local kept
  kept=$(mktemp -d)
  cp requirements/*.txt "$kept"
  # shellcheck disable=SC2119 # nothing moves to newer versions
  lock
  diff -r requirements "$kept"
  rm -r "$kept"
}

# On lab hosts and containers a test that fails is tried once more (--reruns, also in Molecule's config.yml); the closing
# summary names it.
suite() {
  local name=$1
  shift
  # Suites run beside each other; each remembers for itself what failed.
  pytest --quiet --override-ini "cache_dir=.pytest_cache/${name%2}" --junitxml "$EVIDENCE/junit-$name.xml" "$@"
}

# Tests that run side by side disturb each other on a crowded machine: what failed gets one more run, one after the
# other. The closing summary names it all the same.
side_by_side() {
  local name=$1
  shift
  suite "$name" --numprocesses 2 --dist loadfile "$@" && return
  say "Once more, one by one: what failed in company."
  suite "${name}2" --last-failed --last-failed-no-failures none "$@"
}

# The README's first command as a person types it, on bare hosts; what a second run does is Molecule's `default` to say.
first_command() {
  ./plane up
  cp "$EVIDENCE/summary.txt" "$EVIDENCE/first-command.txt"
  remove_labs "skeldir_lab=$LAB"
}

no_secret_in_what_was_printed() {
  local secrets
  # Of an authority's key its first line: the last ones are the public half, which a diff may show.
  secrets=$(cat inventory/lab/.secrets/*/* && sed --separate --quiet 2p inventory/lab/.authority/*/ca.key)
  ! grep --recursive --files-with-matches --fixed-strings "$secrets" "$EVIDENCE"
}

finish() {
  local scenario group
  for group in "${BESIDE[@]}"; do kill -- "-$group" 2>/dev/null || true; done
  remove_labs "skeldir_lab=$LAB"
  for scenario in molecule/*/molecule.yml; do
    remove_labs "skeldir_scenario=$(basename "$(dirname "$scenario")")"
  done
}

static_checks() {
  beside check ansible-lint "roles, playbooks and YAML (ansible-lint)" ansible-lint
  check ruff "format and lint of the Python code (ruff)" python_style
  check mypy "types and the order of imports (mypy, import-linter)" python_types
  check shellcheck "shell scripts (shellcheck)" shell_style
  check workflow "the workflow (check-jsonschema)" \
    check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml
  check locks "the locked requirements are what pyproject.toml resolves to" locks_are_current
  wait_for_those_beside
}

# What needs no lab host.
tests_on_this_machine() {
  check unit "unit tests" side_by_side unit tests/unit
  check watching "alerts fire and end, panels show something, runbooks run" python -m monitoring check
  # Each file on a Postgres of its own: they mostly wait.
  check real "on a real Postgres: sessions, workers, broker, dead letters" \
    side_by_side real tests/integration tests/broker tests/beat tests/dlq tests/rules
}

tests_of_scenarios() {
  local name
  for name in "$@"; do
    if [ "$name" = compose ]; then
      prepare_compose || say "docker compose can't be had; its tests will say so"
      check compose "compose.yaml: serves every queue, is hardened, comes back" suite compose --reruns 1 tests/compose
    else
      check "molecule-$name" "Molecule scenario $name" molecule test --scenario-name "$name"
    fi
  done
}

tests_beside_the_lab() {
  tests_on_this_machine
  tests_of_scenarios queues # its drills mostly wait, which the first lab's tests don't
}

if [ -n "$FAST" ]; then
  prepare_machine fast
  prepare_tools
else
  prepare_machine tests
  start_engine
  prepare_tools lab
  trap finish EXIT # `prepare_tools` has one of its own meanwhile
fi

if [ ${#SCENARIOS[@]} -gt 0 ]; then
  tests_of_scenarios "${SCENARIOS[@]}"
else
  static_checks
  if [ -n "$FAST" ]; then
    tests_on_this_machine
  elif [ "$(failed)" -gt 0 ]; then
    say "Not run: the tests, because something above failed."
  else
    COUNTING=()
    # Lab hosts and tests mostly wait: side by side they fill two cores, for about the same time.
    beside tests_beside_the_lab
    check first "the README's first command" first_command
    # `fleet` rolls releases over four hosts and takes its time: ./plane test fleet
    mapfile -t SCENARIOS < <(cd molecule && printf '%s\n' */molecule.yml | cut -d/ -f1 | grep -vxE 'fleet|queues')
    tests_of_scenarios "${SCENARIOS[@]}" compose
    wait_for_those_beside
    check pasted "every command of every runbook was pasted" python -m monitoring pasted "$EVIDENCE/pasted.txt"
  fi
fi
# compose.yaml's tests alone make no lab, whose secrets these are.
[ ${#SCENARIOS[@]} = 0 ] || [ "${SCENARIOS[*]}" = compose ] ||
  check secrets "no secret in anything that was printed" no_secret_in_what_was_printed

[ ! -f "$EVIDENCE/first-command.txt" ] || { echo && cat "$EVIDENCE/first-command.txt"; }
printf '%-66s %4d s\n' "all of it" $((SECONDS - STARTED)) >>"$STAGES"
echo && cat "$STAGES" && echo
python scripts/count_tests.py "$EVIDENCE" --stages-failed "$(failed)" "${COUNTING[@]}"
