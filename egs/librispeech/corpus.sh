# shellcheck shell=bash disable=SC2034,SC2154  # variables are shared with the drivers
# LibriSpeech (OpenSLR 12), or Mini LibriSpeech (OpenSLR 31) by --subset mini; read English books. See README.md.

subsets="resplit mini 100 960"
subset=${subset:-960}
[[ $subset == 960 ]] || subset_tag=_$subset
[[ $allow_incomplete == false ]] || subset_tag+=_incomplete
corpus_dir=$download_dir/LibriSpeech
corpus_source="OpenSLR 12 and 31"
lhotse_recipe=librispeech
tune_sets="test-clean=dev-clean test-other=dev-other"

case $subset in
    resplit)
        # test-clean divided by speaker: half of each are women. The others of test-clean are for training, and so is
        # dev-clean where its folder is there, which other people may have coded differently: it is never tested on.
        own_dev_speakers=(672 1221 4507 6930)
        own_test_speakers=(1089 1580 2830 3575 4992 7127 8455 8555)
        own_sources=(test-clean)
        corpus_source="OpenSLR 12, resplit of test-clean"
        if [[ -d $corpus_dir/dev-clean ]]; then
            own_sources+=(dev-clean)
            own_speakers=("$corpus_dir"/dev-clean/*/)
            corpus_source+=" and ${#own_speakers[@]} speakers of dev-clean"
        fi
        train_splits="resplit-train"
        dev_splits="resplit-dev"
        test_splits="resplit-test"
        notice="Not comparable with LibriSpeech's figures: trained on speakers of test-clean, which others test on."
        ;;
    mini)
        train_splits="train-clean-5"
        dev_splits="dev-clean-2"
        test_splits="dev-clean-2" # Mini LibriSpeech has no test set
        ;;
    100)
        train_splits="train-clean-100"
        dev_splits="dev-clean dev-other"
        test_splits="test-clean test-other"
        ;;
    *)
        train_splits="train-clean-100 train-clean-360 train-other-500"
        dev_splits="dev-clean dev-other"
        test_splits="test-clean test-other"
        ;;
esac

token_type=bpe
vocab_size=256
speed_perturb=true
default_config=splitformer

# Language models of the corpus's authors (OpenSLR 11); the 4-gram, 1.4 GB and too large for
# a search's graph, is for rescoring: --rescore-lm-order 4.
own_openslr=https://www.openslr.org/resources
own_lm_arpa_of() {
    case $subset/$1 in
        resplit/*) ;; # its own text
        */3) echo "$own_openslr/11/3-gram.pruned.1e-7.arpa.gz" ;;
        */4) echo "$own_openslr/11/4-gram.arpa.gz" ;;
    esac # other orders are estimated from the training text
}
lm_order=3 rescore_lm_order=3
lm_arpa_url=$(own_lm_arpa_of "${given[lm_order]:-$lm_order}")
rescore_lm_arpa_url=$(own_lm_arpa_of "${given[rescore_lm_order]:-$rescore_lm_order}")

split_hours="dev-clean=5.4 dev-other=5.1 test-clean=5.4 test-other=5.3 train-clean-100=100.6 train-clean-360=363.6
    train-other-500=496.7 dev-clean-2=2.0 train-clean-5=5.3 resplit-train=9.2 resplit-dev=0.6 resplit-test=1.1"
declare -gA own_archive_gb=(
    [dev-clean]=0.34 [dev-other]=0.32 [test-clean]=0.35 [test-other]=0.33 [train-clean-100]=6.4 [train-clean-360]=23.1
    [train-other-500]=30.6 [dev-clean-2]=0.13 [train-clean-5]=0.34
)
declare -gA own_archive_md5=(
    [dev-clean]=42e2234ba48799c1f50f24a7926300a1
    [dev-other]=c8d0bcc9cca99d4f8b62fcc847357931
    [test-clean]=32fa31d27d2e1cad72775fee3f4849a9
    [test-other]=fb5a50374b501bb3bac4815ee91d3135
    [train-clean-100]=2a93770f6d5c6c964bc36631d331a522
    [train-clean-360]=c0e676e450a7ff2f54aeade5171606fa
    [train-other-500]=d1a0fd59409feb2c614ce4d30c387708
    [dev-clean-2]=6d7ab67ac6a1d2c993d050e16d61080d
    [train-clean-5]=5df7d4e78065366204ca6845bb08f490
)

# The splits of LibriSpeech that are read.
own_parts() {
    if [[ $subset == resplit ]]; then echo "${own_sources[@]}"; else echo "${splits[@]}"; fi
}

# Archives, and as much again unpacked.
download_sizes() {
    local split size
    for split in $(own_parts); do
        size=${own_archive_gb[$split]:-}
        [[ -z $size || -d $corpus_dir/$split ]] ||
            printf '%s\n' "$download_dir/$split.tar.gz=$size" "$corpus_dir/$split=$size"
    done
}

# Existing splits are used if they are complete; new ones are unpacked into a temporary folder and renamed.
download_corpus() {
    local split resource flags
    for split in $(own_parts); do
        flags=()
        [[ $allow_incomplete == false ]] || flags+=(--allow-incomplete)
        [[ $subset != resplit || $split != dev-clean ]] || flags+=(--allow-fewer-speakers)
        if [[ -d $corpus_dir/$split ]]; then
            run_python egs/librispeech/local/check_split.py --folder "$corpus_dir/$split" "${flags[@]}"
            continue
        fi
        [[ -v "own_archive_md5[$split]" ]] || die "LibriSpeech has no split '$split'; it has: ${!own_archive_md5[*]}"
        resource=12
        case $split in *-2 | *-5) resource=31 ;; esac
        run_python local/fetch_archive.py --url "$own_openslr/$resource/$split.tar.gz" \
            --archive "$download_dir/$split.tar.gz" --md5 "${own_archive_md5[$split]}" \
            --member "LibriSpeech/$split" --unpack "$corpus_dir/$split"
    done
}

prepare_manifests() {
    local flags sources=(test-clean)
    case $1 in
        resplit-train)
            sources=("${own_sources[@]}")
            flags=(--exclude-speakers "${own_dev_speakers[@]}" "${own_test_speakers[@]}")
            ;;
        resplit-dev) flags=(--speakers "${own_dev_speakers[@]}") ;;
        resplit-test) flags=(--speakers "${own_test_speakers[@]}") ;;
        *) manifests_from_recipe "$@"; return ;;
    esac
    run_python egs/librispeech/local/resplit.py --corpus-dir "$corpus_dir" --sources "${sources[@]}" \
        --recordings "$2" --supervisions "$3" --num-jobs "$num_jobs" "${flags[@]}" "${common_flags[@]}"
}

# The vocabulary of the language models.
extra_words() {
    local words=$download_dir/librispeech-vocab.txt
    if [[ -n $lm_arpa_url ]]; then
        run_python local/fetch_archive.py --url "$own_openslr/11/librispeech-vocab.txt" --archive "$words" >&2
        cat "$words"
    fi
}
