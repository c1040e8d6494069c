# shellcheck shell=bash disable=SC2034,SC2154  # variables are shared with the drivers
# CMU AN4 ("Census"): 948 training and 130 test utterances, 74 and 10 speakers, of spelled names, addresses,
# numbers and commands, read over a close-talking microphone. See README.md.

own_archive_url=https://dldata-public.s3.us-east-2.amazonaws.com/an4_sphere.tar.gz
own_archive_md5=a4c4cd480d397e86ce31d70f099b9627
corpus_source="an4_sphere.tar.gz $own_archive_md5"

train_splits="train"
dev_splits="dev"
test_splits="test"
# Three women and five men; none of them also recorded under a second name, such as mdcs and mdcs2.
own_dev_speakers=(fclc fkai fplp mcen mewl mjgk mmtm msct)

token_type=char
lm_order=4 # perplexity of held-out training speakers: 20.8, 17.2, 16.4, 16.2 for orders 2 to 5
speed_perturb=true
default_config=splitformer

download_corpus() {
    run_python local/fetch_archive.py --url "$own_archive_url" --md5 "$own_archive_md5" --member an4 \
        --archive "$download_dir/an4_sphere.tar.gz" --unpack "$corpus_dir"
}

prepare_manifests() {
    local half=train speakers=()
    case $1 in
        train) speakers=(--exclude-speakers "${own_dev_speakers[@]}") ;;
        dev) speakers=(--speakers "${own_dev_speakers[@]}") ;;
        test) half="test" ;;
        *) die "AN4 has no split '$1'; it has train, dev and test" ;;
    esac
    run_python egs/an4/local/manifests.py --fileids "$corpus_dir/etc/an4_$half.fileids" \
        --transcription "$corpus_dir/etc/an4_$half.transcription" --audio-dir "$corpus_dir/wav" \
        --recordings "$2" --supervisions "$3" "${speakers[@]}" "${common_flags[@]}"
}

# The corpus has a closed dictionary: all words that its test may ask for, some of which are not in the training text.
extra_words() {
    run_python egs/an4/local/words.py --dictionary "$corpus_dir/etc/an4.dic"
}
