#!/bin/sh
# Compares dpo.h with its peers: golden checkpoints, transformers, tokenizers, TRL, PEFT, PyTorch's
# bf16, and an independent BTLM in PyTorch. Makes their Python environment first (../setup_venv.sh,
# DPO_VENV); after that it takes about 11 minutes on two cores. Data from ../shared beside the
# project, or $DPO_SHARED, is used where it is there; each script says what it had to skip without.
#
# Each script prints what it compared, how far apart the two are and how far they may be; its
# opening comment says why. The last line adds up; the exit status is 0 if nothing failed.
set -u
cd "$(dirname "$0")/../.." || exit 1
export PYTHONDONTWRITEBYTECODE=1

python=$(sh tests/setup_venv.sh) || exit 1
python=$(echo "$python" | tail -n 1)
make train eval || exit 1

work=$(mktemp -d) || exit 1
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
passed=0
failed=0

# Adds up what a script said in $work/log. One that does not end with "N passed, N failed" counts as
# one, by its exit status.
count() {
    status=$(cat "$work/status")
    counts=$(tail -n 1 "$work/log" | sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p')
    set -- "$1" ${counts:-$((status == 0)) $((status != 0))}
    if [ "$status" -ne 0 ] && [ "$3" -eq 0 ]; then set -- "$1" "$2" 1; fi
    passed=$((passed + $2))
    failed=$((failed + $3))
    echo "$1: $2 passed, $3 failed, exit status $status, $(($(date +%s) - started)) s"
}

compare() {
    echo
    started=$(date +%s)
    { "$python" "tests/conformance/$1" 2>&1; echo $? >"$work/status"; } | tee "$work/log"
    count "$1"
}

# The tokenizers take the longest and one core, so they go on beside all the others.
begun=$(date +%s)
data=${DPO_SHARED:-../shared}/data
[ -d "$data" ] || data=
"$python" tests/conformance/tokenizers_live.py ${data:+"$data"} >"$work/tokenizers" 2>&1 &
pid=$!

compare golden_live.py
compare neox_live.py
compare btlm_live.py
compare export_live.py
compare trl_live.py
compare peft_files_live.py
compare lora_live.py
compare bf16_live.py

echo
wait "$pid"
echo $? >"$work/status"
pid=
started=$begun
tee "$work/log" <"$work/tokenizers"
count tokenizers_live.py

echo
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
