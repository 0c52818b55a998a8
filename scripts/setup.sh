# Sourced by quickstart.sh and test.sh: the virtual environment in the checkout, installed from setup.cfg.

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# gigabytes EXTRA PYTHON: free disk space that an installation needs. PyPI's torch is a CUDA build for Linux and Python 3.12 or newer.
gigabytes() {
  case $1 in
    test* | dev | torch) "$2" -c 'import sys; print(12 if sys.platform == "linux" and sys.version_info[:2] >= (3, 12) else 4)' ;;
    *) echo 4 ;;
  esac
}

# setup_environment EXTRA: makes .venv with flax_switch[EXTRA] and activates it; quick where that is done already.
setup_environment() {
  local extra=$1 python="" candidate stamp
  for candidate in "${PYTHON:-}" python3 python3.{20..11} python ~/.pyenv/versions/3.*/bin/python; do
    # A shim of pyenv is there for versions that are not chosen, too, and fails.
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  [ -n "$python" ] || die "needs Python 3.11 or newer, and found none; install one, or name it: PYTHON=/path/to/python3.12 bash $0"
  stamp=.venv/installed-$extra-$(cat setup.cfg setup.py | cksum | tr ' ' -)
  if [ ! -f "$stamp" ]; then
    say "Installing flax_switch[$extra] into .venv (a few minutes the first time)"
    local free needed
    free=$(df -Pk . | awk 'NR == 2 { print $4 }')
    needed=$(gigabytes "$extra" "$python")
    [ "$free" -gt $((needed * 1000000)) ] ||
      die "needs $needed GB of free disk space here, and there are $((free / 1000)) MB; free some and run it again."
    [ -x .venv/bin/python ] || "$python" -m venv --clear .venv ||
      die "cannot create a virtual environment in .venv; on Debian and Ubuntu: apt install python3-venv"
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]" 2>.venv/pip.log; then
      tail -n 3 .venv/pip.log >&2
      die "pip could not install the packages (log: .venv/pip.log). Without a network connection, connect and run it again; what is there is kept."
    fi
    touch "$stamp"
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
}
