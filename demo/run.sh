#!/bin/sh
# make demo: a tiny model learns to talk, kindly and rudely by turns, and then to be kind.
#
#   sh demo/run.sh [SEED]           everything it makes lies in build/demo
#   sh demo/run.sh [SEED] --lora    trains an adapter of the model instead of all its weights
set -e
cd "$(dirname "$0")/.."
seed=1
lora=
rate=5e-5
usage="usage: sh demo/run.sh [SEED] [--lora]"
seen=
# All arguments are checked before anything of the last demo is removed.
for argument in "$@"; do
    case $argument in
    -h | --help) echo "$usage"; exit;;
    --lora) lora=--lora; rate=3e-4;;
    "" | *[!0-9]* | ????????????????*)
        echo "demo: '$argument' is no seed, a number of 1 to 15 digits; $usage" >&2
        exit 2;;
    *) [ -z "$seen" ] || { echo "demo: two seeds; $usage" >&2; exit 2; }
        seed=$argument seen=1;;
    esac
done
out=build/demo
python=${PYTHON:-python3}
# On a busy machine threads that spin while they wait cost more than threads that sleep.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
[ -x train ] && [ -x eval ] || { echo "demo: train and eval are not built: make demo does both" >&2; exit 1; }
rm -rf "$out"
mkdir -p "$out"

say() { printf '\n== %s\n' "$*" >&2; }

say "1. Text: questions with kind and with rude answers, half and half"
"$python" demo/make_data.py "$out"
wc -l "$out"/text.jsonl "$out"/pairs.jsonl "$out"/dev.jsonl | sed '$d' >&2

say "2. A model with random weights reads it until it talks like that"
./train init -o "$out/new.bin" --arch btlm --d-model 96 --n-layers 3 --n-heads 4 \
        --context-length 256 --seed "$seed" >&2
./train sft -m "$out/new.bin" -d "$out/text.jsonl" -o "$out/sft" --max-length 200 \
        --max-prompt-length 100 --batch-size 4 --epochs 9 --learning-rate 1.5e-3 \
        --adam-beta2 0.98 --seed "$seed" > "$out/sft.txt"

say "3. DPO: the kind answer is preferred; watch rewards/accuracies on questions it never trains on"
./train dpo -m "$out/sft" -d "$out/pairs.jsonl" --eval-data "$out/dev.jsonl" -o "$out/dpo" \
        --max-length 200 --max-prompt-length 100 --batch-size 16 --epochs 3 \
        --learning-rate "$rate" --eval-steps 3 --seed "$seed" $lora
[ -z "$lora" ] || printf 'the adapter has %d bytes, the model %d\n' \
    "$(wc -c < "$out/dpo/adapter.bin")" "$(wc -c < "$out/sft/model.bin")"

say "4. The held-out questions, asked eight times each, before and after"
for repeat in 1 2 3 4 5 6 7 8; do
    for model in sft dpo; do
        ./eval generate -m "$out/$model" -d "$out/ask.jsonl" --temperature 1 --top-p 1 \
               --max-new-tokens 60 --seed "$repeat" 2> "$out/eval.txt" >> "$out/$model.jsonl" ||
            { cat "$out/eval.txt" >&2; exit 1; }
    done
done
"$python" demo/compare.py "$out/sft.jsonl" "$out/dpo.jsonl"
