# shellcheck shell=bash disable=SC2034,SC2154  # variables are shared with the drivers
# Commands, questions, numbers and dates synthesised with espeak-ng; deterministic, and made in a minute.
# The files have LibriSpeech's layout, which Lhotse's recipe for LibriSpeech reads. See README.md.

own_seed=42
corpus_source="egs/mini/corpus.toml $(checksum egs/mini/corpus.toml) seed $own_seed"
[[ -z $limit_utterances ]] || corpus_source+=" limit $limit_utterances"
train_splits="train"
dev_splits="dev"
test_splits="test"
lhotse_recipe=librispeech

token_type=char
lm_order=3
speed_perturb=false # the voices' rates differ
default_config=splitformer

download_corpus() {
    local limit=()
    [[ -z $limit_utterances ]] || limit=(--limit-utterances "$limit_utterances")
    run_python egs/mini/local/synthesise.py --spec egs/mini/corpus.toml --output-dir "$corpus_dir" --seed "$own_seed" \
        --num-jobs "$num_jobs" "${limit[@]}"
}
