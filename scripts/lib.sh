# shellcheck shell=bash
# What ./plane and scripts/test.sh share: saying what happens, and getting a bare machine ready.

LAB=${SKELDIR_LAB:-skeldir-lab}
SUITE=${SKELDIR_LAB_SUITE:-bookworm}
export SKELDIR_LAB=$LAB SKELDIR_LAB_SUITE=$SUITE
STATE=$PWD/.lab
LOGS=${SKELDIR_LOGS:-$STATE/log}
STARTED=$SECONDS

say() { printf '%s\n' "$*"; }
fail() {
  printf 'plane: %s\n' "$*" >&2
  exit 1
}
elapsed() { printf '%d:%02d' $(((SECONDS - STARTED) / 60)) $(((SECONDS - STARTED) % 60)); }

# stage TEXT COMMAND…: run a step with its output in a log; a line when it begins, one when it ends, on a terminal
# what it is at in between, and the log's own end where it failed.
stage() {
  local text=$1 began=$SECONDS log pid
  shift
  mkdir -p "$LOGS"
  log=$LOGS/$(printf '%s' "$text" | tr -cs 'a-zA-Z0-9' '-' | cut -c1-60).log
  printf '[%s] %s …\n' "$(elapsed)" "$text"
  # In the background, because bash ignores `set -e` inside a command whose status is asked for.
  ("$@") >"$log" 2>&1 </dev/null &
  pid=$!
  while [ -t 1 ] && [ -d "/proc/$pid" ]; do
    printf '\r\033[K[%s]   %s' "$(elapsed)" "$(grep -oE '^(TASK|PLAY) \[.*\]' "$log" | tail -n 1 | cut -c1-100)"
    sleep 1
  done
  [ ! -t 1 ] || printf '\r\033[K'
  if wait "$pid"; then
    printf '[%s]   done in %d s\n' "$(elapsed)" $((SECONDS - began))
  else
    printf '[%s]   FAILED after %d s; the end of %s:\n' "$(elapsed)" $((SECONDS - began)) "${log#"$PWD"/}" >&2
    grep -vE '^\s*$' "$log" | tail -n 40 | sed 's/^/      /' >&2
    return 1
  fi
  LAST_LOG=$log
}

recap() { sed -n '/^PLAY RECAP/,$p' "$LAST_LOG" | grep changed= | sed 's/^/        /'; }

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

postgres_bin() { find /usr/lib/postgresql -path '*/bin/initdb' 2>/dev/null | sort -V | tail -n 1; }

# prepare_machine lab|tests: Debian's packages for that, told before they are installed.
prepare_machine() {
  local purpose=$1 missing=()
  case "$(uname -m)" in x86_64 | aarch64) ;; *) fail "this machine is a $(uname -m); x86_64 or aarch64 is needed" ;; esac
  command -v python3 >/dev/null || fail "python3 is missing"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "python3 is $(python3 -V | cut -d' ' -f2); 3.11 or later is needed (Debian 12 and 13 have it)"
  [ "$(df --output=avail -k . | tail -n 1)" -gt 4000000 ] || fail "less than 4 GB are free here; the lab needs them"
  python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
  if [ "$purpose" != fast ] && ! docker info >/dev/null 2>&1; then
    command -v dockerd >/dev/null || missing+=(docker.io iptables)
  fi
  [ "$purpose" = fast ] || command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
  [ "$purpose" = lab ] || [ -n "$(postgres_bin)" ] || missing+=(postgresql)
  if [ ${#missing[@]} = 0 ]; then
    return 0
  fi
  command -v apt-get >/dev/null || fail "${missing[*]} is missing, and this is not a Debian machine where apt-get could install it"
  [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || fail "${missing[*]} must be installed: run this as root, or install sudo"
  say "This machine lacks, and gets from Debian's packages: ${missing[*]}"
  stage "installing ${missing[*]}" install_packages "${missing[@]}"
  mkdir -p "$STATE" && printf '%s\n' "${missing[@]}" >>"$STATE/packages"
}

install_packages() {
  local quiet=/etc/postgresql-common/createcluster.d/skeldir.conf
  retry as_root apt-get -qq -o Acquire::Retries=3 update
  # The tests make clusters of their own; Debian's default one isn't wanted on this machine.
  as_root mkdir -p "$(dirname "$quiet")"
  echo "create_main_cluster = false" | as_root tee "$quiet" >/dev/null
  retry as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 install --yes --no-install-recommends "$@"
  as_root rm -f "$quiet"
}

# start_engine: the Docker engine that answers, or one of our own, which `./plane down` ends.
start_engine() {
  local wait
  docker info >/dev/null 2>&1 && return 0
  if [ -d /run/systemd/system ]; then
    as_root systemctl start docker
  else
    say "No Docker engine answers: starting one (./plane down ends it)"
    mkdir -p "$STATE"
    # Not a child that a Ctrl-C of this run would end, too.
    as_root setsid dockerd --data-root "$STATE/docker" --pidfile "$STATE/dockerd.pid" >"$STATE/dockerd.log" 2>&1 </dev/null &
  fi
  for wait in $(seq 60); do
    docker info >/dev/null 2>&1 && return 0
    sleep 0.5
  done
  fail "the Docker engine did not answer within $((wait / 2)) seconds; see ${STATE#"$PWD"/}/dockerd.log"
}

stop_engine() {
  local pid wait
  [ -s "$STATE/dockerd.pid" ] || return 0
  pid=$(cat "$STATE/dockerd.pid")
  as_root kill "$pid" 2>/dev/null || return 0
  for wait in $(seq 60); do
    [ -d "/proc/$pid" ] || return 0
    sleep 0.5
  done
  fail "the Docker engine (process $pid) did not end within $((wait / 2)) seconds"
}

# prepare_tools [lab]: .venv from the locked requirements, beside it the lab's base image.
prepare_tools() {
  local image=
  if [ "${1:-}" = lab ]; then
    shift
    lab/build-image "$SUITE" >"$(mkdir -p "$LOGS" && echo "$LOGS/image-$SUITE.log")" 2>&1 &
    image=$!
  fi
  if [ "$(tools_stamp)" != "$(cat .venv/stamp 2>/dev/null)" ]; then
    stage "installing the locked tools into .venv (from PyPI)" make_venv
  fi
  activate
  if [ -n "$image" ] && [ -d "/proc/$image" ]; then
    stage "waiting for the base image of the lab hosts ($SUITE)" wait_for "$image"
  fi
  [ -z "$image" ] || wait "$image" || {
    tail -n 5 "$LOGS/image-$SUITE.log" >&2
    fail "the base image of the lab hosts could not be made"
  }
}

wait_for() { while [ -d "/proc/$1" ]; do sleep 0.2; done; }

tools_stamp() { (python3 -V && cat requirements/tools.txt) | sha256sum; }

make_venv() {
  rm -rf .venv
  python3 -m venv .venv
  # uv itself by its locked hash; where its index can't be reached, pip's own configuration decides.
  awk '/^[a-z]/ { mine = /^uv==/ } mine' requirements/tools.txt >.venv/uv.txt
  retry .venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
  VIRTUAL_ENV=$PWD/.venv retry .venv/bin/uv pip sync --quiet --require-hashes requirements/tools.txt ||
    .venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/tools.txt
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  tools_stamp >.venv/stamp
}

activate() {
  [ -x .venv/bin/ansible-playbook ] || fail "the tools are not installed yet; ./plane up or ./plane test does that"
  export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH ANSIBLE_CONFIG=$PWD/ansible.cfg
  export ANSIBLE_FORCE_COLOR=0 NO_COLOR=1 MOLECULE_COMMAND_BORDERS=false
}

remove_lab() {
  local containers
  containers=$(docker ps --all --quiet --filter "label=skeldir_lab=$1")
  # shellcheck disable=SC2086 # one word an id
  [ -z "$containers" ] || docker rm --force --volumes $containers >/dev/null
  docker network rm "$1" >/dev/null 2>&1 || true # it may never have been made
}

lock() {
  local options=(--universal --python-version 3.11 --generate-hashes --no-header --quiet)
  retry uv pip compile pyproject.toml "${options[@]}" --output-file requirements/app.txt
  retry uv pip compile pyproject.toml --group tools "${options[@]}" --output-file requirements/tools.txt
}
