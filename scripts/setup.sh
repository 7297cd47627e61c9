# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
# Sourced by the other scripts: a Python environment of the checkout's own, in .venv.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$repo/.venv/bin/python

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# install_python EXTRA: make .venv and install ptinspect into it, editable; nothing to do if
# pyproject.toml has not changed since.
install_python() {
    local stamp=$repo/.venv/installed$1
    if [ -e "$stamp" ] && cmp -s "$stamp" "$repo/pyproject.toml"; then return; fi
    say "installing ptinspect$1 into .venv"
    if [ ! -x "$python" ]; then
        python3 -m venv "$repo/.venv" ||
            die "python3 cannot make a virtual environment: on Debian, apt-get install python3-venv"
    fi
    "$python" -m pip install --quiet --disable-pip-version-check --editable "$repo$1"
    cp "$repo/pyproject.toml" "$stamp"
}
