# shellcheck shell=bash
# What ./plane and scripts/test.sh share: saying what happens, and getting a bare machine ready.

LAB=${SKELDIR_LAB:-skeldir-lab}
SUITE=${SKELDIR_LAB_SUITE:-bookworm}
STATE=$PWD/.lab
LOGS=${SKELDIR_LOGS:-$STATE/log}
STARTED=$SECONDS
export SKELDIR_LAB=$LAB SKELDIR_LAB_SUITE=$SUITE LAB STATE LOGS STARTED
mkdir -p "$STATE" "$LOGS"

say() { printf '%s\n' "$*"; }
fail() {
  printf 'plane: %s\n' "$*" >&2
  exit 1
}
elapsed() { printf '%d:%02d' $(((SECONDS - STARTED) / 60)) $(((SECONDS - STARTED) % 60)); }

# What is worth seeing of a long step while it runs: the plays it goes through, and a test that fails.
headlines() {
  local line
  while IFS= read -r line; do
    case "$line" in
      'PLAY ['*) line=${line#PLAY [} && printf '[%s]   %s\n' "$(elapsed)" "${line%%]*}" ;;
      FAILED\ *::*) printf '[%s]   %s\n' "$(elapsed)" "$line" ;;
    esac
  done
}

# A function runs in a shell of its own: in the condition below, bash would let it go on after a failed command.
run() {
  if [ "$(type -t "$1")" = function ]; then
    bash -euo pipefail -c "$(declare -f); \"\$@\"" plane "$@"
  else
    "$@"
  fi
}

# stage NAME TEXT COMMAND…: run a step with its output in a log; a line when it begins and when it ends, and the
# log's own end where it failed.
stage() {
  local log=$LOGS/$1.log text=$2 began=$SECONDS
  shift 2
  printf '[%s] %s …\n' "$(elapsed)" "$text"
  if run "$@" 2>&1 </dev/null | tee "$log" | headlines; then
    printf '[%s]   done in %d s: %s\n' "$(elapsed)" $((SECONDS - began)) "$text"
  else
    printf '[%s]   FAILED after %d s: %s; the end of %s:\n' "$(elapsed)" $((SECONDS - began)) "$text" "${log#"$PWD"/}" >&2
    grep -vE '^\s*$' "$log" | tail -n "${STAGE_TAIL:-40}" | sed 's/^/      /' >&2
    return 1
  fi
}

retry() {
  local attempt
  for attempt in 1 2 3; do
    "$@" && return 0
    say "attempt $attempt of 3 failed: $*"
    sleep $((attempt * 5))
  done
  return 1
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# The first Python that really runs (a pyenv shim may not) and is new enough.
find_python() {
  local python
  for python in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "no Python 3.11 or later is on this machine; Debian 12 and 13 have it as python3"
}

# prepare_machine lab|tests|fast|tools: Debian's packages for that, told before they are installed.
prepare_machine() {
  local purpose=$1 missing=()
  case "$(uname -m)" in x86_64 | aarch64) ;; *) fail "this machine is a $(uname -m); x86_64 or aarch64 is needed" ;; esac
  [ "$(df --output=avail -k . | tail -n 1)" -gt 4000000 ] || fail "less than 4 GB are free here; the lab needs them"
  PYTHON=$(find_python)
  export PYTHON
  "$PYTHON" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
  if [ "$purpose" = lab ] || [ "$purpose" = tests ]; then
    command -v dockerd >/dev/null || docker info >/dev/null 2>&1 || missing+=(docker.io iptables)
    command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
    command -v ssh >/dev/null || missing+=(openssh-client)
  fi
  if [ "$purpose" = fast ] || [ "$purpose" = tests ]; then
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
    command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] || missing+=(pgbouncer)
    command -v promtool >/dev/null || missing+=(prometheus)
    command -v amtool >/dev/null || missing+=(prometheus-alertmanager)
  fi
  if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null ||
      fail "${missing[*]} is missing, and this is not a Debian machine, where apt-get would install it"
    need_root "installing ${missing[*]}"
    say "This machine lacks, and now gets from Debian's packages: ${missing[*]}"
    stage packages "installing ${missing[*]}" install_packages "${missing[@]}"
    printf '%s\n' "${missing[@]}" >>"$STATE/packages"
  fi
}

need_root() {
  [ "$(id -u)" = 0 ] || sudo -v 2>/dev/null || fail "$1 needs root: run this as root, or as a user with sudo"
}

install_packages() {
  local quiet=/etc/postgresql-common/createcluster.d/skeldir.conf policy=/usr/sbin/policy-rc.d
  as_root dpkg --configure -a # an installation that was interrupted
  retry as_root apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 update
  # The tests make clusters of their own; Debian's default one isn't wanted on this machine.
  as_root mkdir -p "$(dirname "$quiet")"
  echo "create_main_cluster = false" | as_root tee "$quiet" >/dev/null
  # Nor does any service start by itself: whatever is needed is started by hand.
  [ ! -e "$policy" ] || policy=
  [ -z "$policy" ] || printf '#!/bin/sh\nexit 101\n' | as_root install -m 755 /dev/stdin "$policy"
  retry as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 \
    install --yes --no-install-recommends "$@"
  as_root rm -f "$quiet" ${policy:+"$policy"}
}

# start_engine: the Docker engine that answers, or one of our own, which `./plane down` ends.
start_engine() {
  local _
  docker info >/dev/null 2>&1 && return 0
  need_root "the Docker engine"
  if [ -d /run/systemd/system ]; then
    say "No Docker engine answers: starting this machine's docker.service (./plane down stops it)"
    as_root systemctl start docker.service
    touch "$STATE/docker.service"
  elif ! as_root docker info >/dev/null 2>&1; then
    say "No Docker engine answers: starting one (./plane down ends it)"
    as_root setsid dockerd --data-root "$STATE/docker" --pidfile "$STATE/dockerd.pid" \
      >"$STATE/dockerd.log" 2>&1 </dev/null &
  fi
  for _ in $(seq 60); do
    docker info >/dev/null 2>&1 && return 0
    ! as_root docker info >/dev/null 2>&1 ||
      fail "the Docker engine answers only root: run this as root, or join the group docker and log in again"
    sleep 0.5
  done
  fail "the Docker engine did not answer within 30 seconds; see .lab/dockerd.log or journalctl -u docker"
}

# prepare_compose: Docker's own `compose` where it answers, else the one of Debian 13, kept in .lab/ for the tests.
prepare_compose() {
  docker compose version >/dev/null 2>&1 && return 0
  export SKELDIR_COMPOSE=$STATE/compose/docker-compose
  [ -x "$SKELDIR_COMPOSE" ] || stage compose-program "fetching docker compose from Debian's packages" fetch_compose
}

# A package root of its own, so that the machine's sources stay as they are; APT checks signatures all the same.
fetch_compose() {
  local root=$STATE/compose mirror apt
  # shellcheck disable=SC2016 # APT's own variable
  mirror=$(apt-get indextargets --format '$(REPO_URI)' | sort --unique | grep '/debian/$' | tail --lines 1) ||
    fail "APT knows no archive of Debian's, from which docker compose could be fetched: install Docker's compose plugin"
  apt=(apt-get -qq -o "Dir=$root" -o "Dir::State::status=$root/status" -o "APT::Architecture=$(dpkg --print-architecture)"
    -o Acquire::Languages=none -o Acquire::Retries=3 -o APT::Sandbox::User=root)
  rm -rf "$root"
  mkdir -p "$root"/etc/apt/{apt.conf.d,preferences.d,sources.list.d} "$root"/var/{lib/apt/lists,cache/apt/archives}/partial
  : >"$root/status"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" \
    >"$root/etc/apt/sources.list"
  retry "${apt[@]}" update
  cd "$root" || return
  retry "${apt[@]}" download docker-compose
  dpkg --extract docker-compose_*.deb package
  ln package/usr/libexec/docker/cli-plugins/docker-compose docker-compose
  ./docker-compose version
}

stop_engine() {
  local pid _
  [ ! -e "$STATE/docker.service" ] || as_root systemctl stop docker.service docker.socket
  pid=$(cat "$STATE/dockerd.pid" 2>/dev/null) || return 0
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ] || return 0
  as_root kill "$pid"
  for _ in $(seq 60); do
    [ -d "/proc/$pid" ] || return 0
    sleep 0.5
  done
  fail "the Docker engine (process $pid) did not end within 30 seconds"
}

# own_lab: the lab's name may belong to another checkout.
own_lab() {
  local owner
  owner=$(docker ps --all --filter "label=skeldir_lab=$LAB" --format '{{.Label "skeldir_checkout"}}' | sort -u)
  [ -z "$owner" ] || [ "$owner" = "$PWD" ] ||
    fail "the lab $LAB belongs to ${owner}; set SKELDIR_LAB to have one of another name beside it"
}

# remove_labs LABEL…: this checkout's lab hosts and networks with those labels.
remove_labs() {
  local label hosts networks mine=(--filter "label=skeldir_checkout=$PWD")
  for label in "$@"; do mine+=(--filter "label=$label"); done
  hosts=$(docker ps --all --quiet "${mine[@]}")
  # shellcheck disable=SC2086 # one word an id
  [ -z "$hosts" ] || docker rm --force --volumes $hosts >/dev/null
  networks=$(docker network ls --quiet "${mine[@]}")
  # shellcheck disable=SC2086 # one word an id
  [ -z "$networks" ] || docker network rm $networks >/dev/null
}

# prepare_tools [lab]: .venv from the locked requirements; beside it the lab's base image and the release.
prepare_tools() {
  local image='' release=''
  if [ "${1:-}" = lab ]; then
    setsid lab/build-image "$SUITE" >"$LOGS/image.log" 2>&1 &
    image=$!
    # shellcheck disable=SC2064 # this id
    trap "kill -- -$image 2>/dev/null || true" EXIT
  fi
  if [ "$(tools_stamp)" != "$(cat .venv/stamp 2>/dev/null)" ]; then
    stage tools "installing the locked tools into .venv (from PyPI)" make_venv
  fi
  activate
  if [ -n "$image" ]; then
    python scripts/build_release.py >"$LOGS/release.log" 2>&1 &
    release=$!
    stage wait "making the lab hosts' base image ($SUITE)" wait_for "$image"
    wait "$image" || fail "the base image can't be made: $(tail -n 1 "$LOGS/image.log")"
    trap - EXIT
    wait "$release" || true # site.yml builds it again and says what is wrong
  fi
}

wait_for() { while [ -d "/proc/$1" ]; do sleep 0.2; done; }

tools_stamp() { ("$PYTHON" -V && cat requirements/tools.txt) | sha256sum; }

make_venv() {
  local pip=(.venv/bin/python -m pip --disable-pip-version-check --retries 5)
  rm -rf .venv
  "$PYTHON" -m venv .venv
  # uv by its locked hash. Where only pip is told of the reachable index, pip goes on alone.
  awk '/^[a-z]/ { mine = /^uv==/ } mine' requirements/tools.txt >.venv/uv.txt
  retry timeout 300 "${pip[@]}" install --quiet --require-hashes --requirement .venv/uv.txt
  VIRTUAL_ENV=$PWD/.venv timeout 600 .venv/bin/uv pip sync --require-hashes requirements/tools.txt ||
    retry timeout 900 "${pip[@]}" install --quiet --require-hashes --requirement requirements/tools.txt
  "${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .
  tools_stamp >.venv/stamp
}

activate() {
  [ -s .venv/stamp ] || fail "the tools are not installed yet; ./plane up or ./plane test does that"
  export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH ANSIBLE_CONFIG=$PWD/ansible.cfg
  export ANSIBLE_FORCE_COLOR=0 NO_COLOR=1 MOLECULE_COMMAND_BORDERS=false
  # Where it is set, each of the many processes would compile Ansible, Celery and their like anew.
  unset PYTHONDONTWRITEBYTECODE
}

# lock [--upgrade]: nothing moves without --upgrade. The files name no index, so that any mirror serves.
lock() {
  local options=(--universal --python-version 3.11 --generate-hashes --no-header --quiet)
  uv pip compile pyproject.toml "${options[@]}" --output-file requirements/app.txt "$@"
  uv pip compile pyproject.toml --group tools "${options[@]}" --output-file requirements/tools.txt "$@"
}
