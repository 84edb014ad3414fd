#!/usr/bin/env bash
# Every test of the project, the fast ones first: ./plane test [--fast] [SCENARIO…]
#
# --fast leaves out what needs lab hosts; naming Molecule scenarios runs only those of them. A run that executed
# fewer tests than scripts/expected-tests says has failed, whatever the others said.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

FAST=
[ "${1:-}" != --fast ] || { FAST=yes && shift; }
SCENARIOS=("$@")
EVIDENCE=$PWD/evidence
LOGS=$EVIDENCE/log
export SKELDIR_LOGS=$LOGS
RESULTS=()
FAILED=0

# check TEXT COMMAND…: a stage whose failure is counted, so that the next ones still run.
check() {
  local text=$1 began=$SECONDS outcome=ok
  stage "$@" || {
    outcome=FAILED
    FAILED=$((FAILED + 1))
  }
  RESULTS+=("$(printf '%-58s %-7s %4d s' "$text" "$outcome" $((SECONDS - began)))")
}

locks_are_current() {
  cp -r requirements "$STATE/locks"
  lock
  diff -r requirements "$STATE/locks"
  rm -r "$STATE/locks"
}

workflow_is_valid() {
  check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
}

types() { mypy && lint-imports; }

shells() {
  local files
  mapfile -t files < <(git ls-files --cached --others --exclude-standard | grep -v '\.j2$' | xargs grep -lE '^#!.*\b(ba)?sh$|^# shellcheck shell=' --)
  shellcheck -x "${files[@]}"
}

suite() { pytest --quiet --junitxml "$EVIDENCE/junit-$1.xml" "tests/$1"; }

# The README's first command as a person types it: on nothing, again on what is there, and taken down.
first_command() {
  ./plane up
  cp evidence/summary.txt "$EVIDENCE/first-command.txt"
  ./plane up | tee "$STATE/again"
  if grep -E 'changed=[1-9]' "$STATE/again"; then
    fail "the second run changed something"
  fi
  remove_lab "$LAB"
}

scenario() { molecule test --scenario-name "$1"; }

finish() {
  local lab
  for lab in $(docker ps --all --format '{{.Label "skeldir_lab"}}' 2>/dev/null | sort -u); do
    case "$lab" in skeldir-molecule-* | "$LAB") remove_lab "$lab" ;; esac
  done
}

rm -rf "$EVIDENCE" && mkdir -p "$EVIDENCE" "$STATE"
prepare_machine "$([ -n "$FAST" ] && echo fast || echo tests)"
if [ -z "$FAST" ]; then
  start_engine
  trap finish EXIT
fi
prepare_tools ${FAST:-lab}

check "format and lint of the Python code (ruff)" sh -c 'ruff format --check . && ruff check .'
check "types and import order (mypy, import-linter)" types
check "roles and playbooks (ansible-lint)" ansible-lint
check "shell scripts (shellcheck)" shells
check "the workflow (check-jsonschema)" workflow_is_valid
check "locked requirements are current" locks_are_current
check "unit tests" suite unit
check "tests on a real Postgres with real workers" suite integration
if [ -z "$FAST" ] && [ "$FAILED" -gt 0 ]; then
  say "Not run: the tests on lab hosts, because the ones above failed."
elif [ -z "$FAST" ]; then
  [ ${#SCENARIOS[@]} -gt 0 ] || check "the README's first command, twice" first_command
  [ ${#SCENARIOS[@]} -gt 0 ] || mapfile -t SCENARIOS < <(cd molecule && printf '%s\n' */molecule.yml | cut -d/ -f1)
  for name in "${SCENARIOS[@]}"; do
    check "Molecule scenario $name" scenario "$name"
  done
fi

echo
printf '%s\n' "${RESULTS[@]}" "" | tee "$EVIDENCE/stages.txt"
[ ! -f "$EVIDENCE/summary.txt" ] || cat "$EVIDENCE/summary.txt"
say "all stages took $(elapsed)"
python scripts/count_tests.py "$EVIDENCE" --stages-failed "$FAILED" ${FAST:+--any-number} ${1:+--any-number}
