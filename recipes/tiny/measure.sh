#!/bin/sh
# The figures of tiny's model card → runs/card, after assemble.py and token_frequencies.py: two
# queues, a core each. What is there is kept: remove runs/card and runs/prompts after new weights.
set -eu
cd "$(dirname "$0")/../.."
out=runs/card
python=${PYTHON:-python}
mkdir -p "$out"
export OMP_NUM_THREADS=1

# measure NAME WORDS…: what they print, in NAME.txt; what is there is kept.
measure() {
    name=$1
    shift
    [ -s "$out/$name.txt" ] && return
    echo "$name"
    "$@" > "$out/$name.part" 2> "$out/$name.log"
    mv "$out/$name.part" "$out/$name.txt"
}

# recipe CORE NAME SCRIPT OPTIONS…
recipe() {
    core=$1 name=$2 script=$3
    shift 3
    measure "$name" taskset -c "$core" "$python" "recipes/tiny/$script" "$@"
}

variations() {
    "$python" recipes/tiny/link_test_music.py
    measure variations taskset -c 0 "$python" -m vampnet_jax evaluate data/test -o runs/prompts \
        --config recipes/tiny/prompts.yaml --excerpts 300 --seconds 4.4 --embedding mel-statistics --embedding crepe-tiny
}

others() {
    recipe 1 presets choose_presets.py
    recipe 1 losses evaluate.py --clips 2 --excerpts 64
    recipe 1 sampling choose_sampling.py
    recipe 1 continuations choose_sampling.py --clips 2 --prefix 5 --ways "as the original, likeliest"
    recipe 1 from_nothing from_nothing.py
    recipe 1 from_nothing_8 from_nothing.py --part validation --clips 1 --seed 2 --pieces 8
    recipe 1 codebooks what_codebooks_tell.py --kept 4
    recipe 1 buzz measure_buzz.py vampnet_jax/models/tiny/codec.safetensors
    recipe 1 rounding rounding.py runs/coarse runs/fine
    recipe 1 gaps loss_in_gaps.py runs/coarse runs/fine
    recipe 1 compression measure_compression.py --excerpts 12
}

variations &
queue=$!
others
wait "$queue"
"$python" -m vampnet_jax benchmark --repeats 3 > "$out/speed.txt"
