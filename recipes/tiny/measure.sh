#!/bin/sh
# The figures of tiny's model card → runs/card, after assemble.py and token_frequencies.py: two
# queues, a core each. What was measured is kept, so this can be run again.
set -eu
cd "$(dirname "$0")/../.."
out=runs/card
python=${PYTHON:-python}
mkdir -p "$out"
trap 'kill 0' INT # a queue in the background ignores Ctrl-C
rm -f "$out/failed"

# All that figures depend on: weights and how they are sampled, runs, tokens, what is measured.
sha256sum vampnet_jax/models/tiny/*.safetensors vampnet_jax/models/tiny/config.json \
    runs/coarse/config.json runs/fine/config.json data/tokens/manifest.json \
    recipes/tiny/*.py recipes/tiny/*.yaml recipes/tiny/split.json > "$out/model.new"
if [ -e "$out/model" ] && ! cmp -s "$out/model" "$out/model.new"; then
    echo "$out has figures of another model, other tokens or other scripts; remove it and runs/prompts" >&2
    exit 1
fi
mv "$out/model.new" "$out/model"

# measure NAME WORDS…: what they print, in NAME.txt, unless it is there.
measure() {
    name=$1
    shift
    [ -s "$out/$name.txt" ] && return
    echo "$name"
    if "$@" > "$out/$name.part" 2> "$out/$name.log"; then
        mv "$out/$name.part" "$out/$name.txt"
    else
        echo "$name failed; $out/$name.log says why" >&2
        touch "$out/failed"
    fi
}

# recipe NAME SCRIPT OPTIONS…
recipe() {
    name=$1 script=$2
    shift 2
    measure "$name" env OMP_NUM_THREADS=1 taskset -c 1 "$python" "recipes/tiny/$script" "$@"
}

"$python" recipes/tiny/link_test_music.py
measure variations env OMP_NUM_THREADS=1 taskset -c 0 "$python" -m vampnet_jax evaluate data/test -o runs/prompts \
    --config recipes/tiny/prompts.yaml --excerpts 300 --seconds 4.4 --embedding mel-statistics --embedding crepe-tiny &
queue=$!
recipe presets choose_presets.py
recipe losses evaluate.py --clips 2 --excerpts 64 --out "$out/evaluation.json"
recipe from_nothing from_nothing.py --pieces 16
recipe sampling choose_sampling.py
recipe continuations choose_sampling.py --clips 2 --prefix 5 --ways "codebook by codebook, top-p 0.9, likeliest"
recipe from_nothing_16 from_nothing.py --part validation --seed 2 --pieces 16
recipe codebooks what_codebooks_tell.py --kept 4
recipe buzz measure_buzz.py vampnet_jax/models/tiny/codec.safetensors
recipe rounding rounding.py runs/coarse runs/fine
recipe gaps loss_in_gaps.py runs/coarse runs/fine
recipe compression measure_compression.py --excerpts 12
wait "$queue"
measure speed "$python" -m vampnet_jax benchmark --repeats 3
[ ! -e "$out/failed" ]
