# shellcheck shell=bash disable=SC2034,SC2154  # variables are shared with the drivers
# TED-LIUM 3 (OpenSLR 51): 452 hours of English talks, cut by their STM files; its legacy dev and test sets. See README.md.

corpus_dir=$download_dir/TEDLIUM_release-3
corpus_source="OpenSLR 51"

train_splits="train"
dev_splits="dev"
test_splits="test"
lhotse_recipe=tedlium
split_hours="train=452 dev=1.6 test=2.6"

token_type=bpe
vocab_size=256
speed_perturb=true
default_config=splitformer

# An existing release is reused.
download_corpus() {
    if [[ -d $corpus_dir ]]; then
        log "$corpus_dir exists"
        return
    fi
    run_python local/fetch_archive.py --url https://www.openslr.org/resources/51/TEDLIUM_release-3.tgz \
        --archive "$download_dir/TEDLIUM_release-3.tgz" --member TEDLIUM_release-3 --unpack "$corpus_dir"
}

# The text as in Kaldi's recipe: no [NOISE], no <unk>, and "they 're" is one word.
prepare_manifests() {
    manifests_from_recipe "$@" --folder "legacy/$1" --recipe-options normalize_text=kaldi
}
