#!/bin/sh
# Make, or find again, the Python environment of `make conformance` and of the fixture scripts:
# PyTorch (CPU), transformers, tokenizers, peft and trl, in the versions that the committed fixtures
# and the stated tolerances were made with.
#
#   DPO_VENV  the environment's directory, outside the source tree
#             (default: ${XDG_CACHE_HOME:-$HOME/.cache}/dpo.h-venv)
#   PYTHON    the interpreter to make it with (default python3; 3.11 or newer)
#
# The last line printed is the path of the environment's python. A complete environment is known by
# its stamp and costs milliseconds. pip's own settings (PIP_EXTRA_INDEX_URL, pip.conf, ...) are
# honoured: on Linux, name PyTorch's index of CPU wheels there to be spared the GPU build, which
# would do as well but is gigabytes.
set -eu

torch='torch==2.13.0'
others='numpy==2.4.6 transformers==5.23.0 tokenizers==0.23.3 peft==0.21.2 trl==1.16.0
        safetensors==0.8.0 accelerate==1.15.0 datasets==5.2.0'

venv=${DPO_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/dpo.h-venv}
python=$venv/bin/python
stamp=$venv/dpo.h-packages
wanted=$(echo $torch $others)

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$python" -c '' 2>/dev/null; then
    echo "$python"
    exit 0
fi

if [ -d "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    echo "setup_venv.sh: $venv exists but is no virtual environment; set DPO_VENV to another" >&2
    exit 1
fi
if ! "$python" -c '' 2>/dev/null; then
    if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "setup_venv.sh: ${PYTHON:-python3} is not Python 3.11 or newer; set PYTHON" >&2
        exit 1
    fi
    echo "setup_venv.sh: making $venv" >&2
    if ! "${PYTHON:-python3}" -m venv --clear "$venv" >&2; then
        echo "setup_venv.sh: failed; is Python's venv module there (Debian: python3-venv)?" >&2
        exit 1
    fi
fi

rm -f "$stamp"
log=$venv/dpo.h-install.log
install() {
    echo "setup_venv.sh: installing $*" >&2
    if ! "$python" -m pip install --disable-pip-version-check "$@" >"$log" 2>&1 </dev/null; then
        tail -n 5 "$log" >&2
        echo "setup_venv.sh: pip failed; the whole of it is in $log" >&2
        exit 1
    fi
}
# torch first and alone, and again with the rest: no dependency can then bring another version.
install $torch
install $torch $others
"$python" -c 'import torch, numpy, transformers, tokenizers, peft, trl, safetensors, datasets'

echo "$wanted" >"$stamp"
echo "$python"
