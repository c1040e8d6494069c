# shellcheck shell=bash disable=SC2034,SC2154  # variables are shared with the drivers
# VoxPopuli, English: 543 hours of speeches in the European Parliament, cut by the transcripts' times. See README.md.

corpus_dir=$download_dir/voxpopuli
own_audio_dir=$corpus_dir/raw_audios/en # where Lhotse's recipe looks for what the archives call original
own_annotations=asr_en.tsv.gz
corpus_source="VoxPopuli en"

train_splits="train"
dev_splits="dev"
test_splits="test"
lhotse_recipe=voxpopuli
split_hours="train=543"

token_type=bpe
vocab_size=256
speed_perturb=true
default_config=splitformer

# Years, and transcripts, that are there already are used as they are.
download_corpus() {
    local year url=https://dl.fbaipublicfiles.com/voxpopuli
    for year in {2009..2020}; do
        if [[ -d $own_audio_dir/$year ]]; then
            log "$own_audio_dir/$year is there"
        else
            run_python local/fetch_archive.py --url "$url/audios/original_$year.tar" \
                --archive "$download_dir/original_$year.tar" --member "original/$year" --unpack "$own_audio_dir/$year"
        fi
    done
    run_python local/fetch_archive.py --url "$url/annotations/asr/$own_annotations" --archive "$corpus_dir/$own_annotations"
}

# The recipe takes the transcripts from the folder that it may write to, which need not be the corpus's.
prepare_manifests() {
    local writable=$data_dir/annotations
    mkdir -p "$writable"
    cp -f "$corpus_dir/$own_annotations" "$writable"
    manifests_from_recipe "$@" --folder raw_audios/en --recipe-options "output_dir=$writable"
}
