# shellcheck shell=bash
# Loads the description of a corpus, egs/NAME/corpus.sh, and sets the paths of its files, for both drivers.
# Needs parse_options.sh and stages.sh; `called_from`, the user's working directory; `corpus`, the default.
# shellcheck disable=SC2034,SC2154  # variables are shared with the drivers

corpus_options=(corpus work_dir download_dir subset train_splits dev_splits test_splits token_type vocab_size
    lm_order lm_prune rescore_lm_order speed_perturb fbank executor num_mel_bins limit_utterances num_jobs bpe_model shar
    musan_dir graphs)
corpus_flags=(skip_checks strict allow_incomplete estimate_lm decode_only on_the_fly)

corpus_usage="  --corpus NAME            a folder of egs/ (default: $corpus)
  --work-dir DIR           folder for data/ and exp/ (default: egs/NAME)
  --download-dir DIR       folder with the corpus's archives; missing ones are downloaded (default: WORK_DIR/download)
  --subset NAME            a subset of the corpus, if it has any
  --limit-utterances N     use at most N utterances of each split, for a quick look
  --train-splits 'A B', --dev-splits, --test-splits, --token-type bpe|char, --vocab-size N, --lm-order N,
  --rescore-lm-order N, --speed-perturb true|false, --num-mel-bins N
                           override what the corpus says
  --fbank lhotse|kaldifeat|linear-mel
                           program that computes the features (default: lhotse); linear-mel is the front end of the
                           authors' released code, without logarithm
  --on-the-fly             store no features of training data; training computes them from audio
  --shar numpy|lilcom      also write the features of training data as Lhotse Shar, and train from that; numpy keeps every
                           number, lilcom takes a third of the space and rounds
  --musan-dir DIR          noise in the layout of MUSAN, for training with augment.noise_p
  --num-jobs N             processes for data preparation (default: one per core)
  --executor local|dask:ADDRESS
                           what computes features: processes here (default), or the workers of a Dask scheduler
  --lm-prune X             prune n-grams worth less than X (such as 1e-7) of the perplexity from HLG and LG; G keeps them
  --estimate-lm            estimate the language model from the training text, even if the corpus provides one
  --graphs 'HLG LG G'      decoding graphs to make; 'words' makes the lexicon alone, 'none' not even that (default: all)
  --bpe-model FILE         use the tokens of this bpe.model instead of training a tokenizer
  --decode-only            compute no features of training data; with --bpe-model no training data are needed, if the corpus
                           provides a language model and words
  --skip-checks            do not ask 'splitformer doctor' whether this machine has what the stages need
  --allow-incomplete       take a folder of the corpus that lacks some of its files as it is; results are kept apart
  --strict                 unreadable audio and bad transcripts are errors; by default they are skipped"

# Defaults of these options.
work_dir='' download_dir='' subset='' fbank=lhotse executor=local num_mel_bins=80 limit_utterances='' graphs='HLG LG G'
num_jobs=$(cores) strict=false allow_incomplete=false estimate_lm=false bpe_model='' decode_only=false
skip_checks=false on_the_fly=false shar='' musan_dir=''

# The variables that an egs/NAME/corpus.sh may set, with their defaults. Variables and functions that serve the corpus alone
# begin with own_, so that a misspelt name is an error.
train_splits='' dev_splits='' test_splits='' # names, separated by spaces
tune_sets=''       # TEST=DEV ...: the dev sets on which choices for these test sets are made (default: the first one)
lhotse_recipe=''   # NAME of lhotse.recipes.prepare_NAME, which makes the manifests
corpus_dir=''      # folder of the corpus (default: DATA_DIR/corpus)
corpus_source=''   # identifies the audio and transcripts; another source means that manifests are made again
corpus_from=''     # own data: what local/manifests_from_source.py reads, with the options source_options
source_options=()
split_hours=''     # hours of audio of the splits, as NAME=HOURS separated by spaces, to check the space on disk
token_type=bpe vocab_size=256
lm_order=3 lm_arpa_url='' lm_prune='' # the language model of HLG and LG; without a URL it is estimated from the text
rescore_lm_order='' rescore_lm_arpa_url='' # the language model of G, which rescores lattices (default: the same)
speed_perturb=false
default_config=''
subsets=''         # names of subsets, if there are any
subset_tag=''      # appended to names of artefacts that depend on the subset
notice=''          # what has to stand above every table of results, such as what they cannot be compared with

# Functions that a corpus.sh may redefine. They see all variables of the drivers.

# Brings the corpus to $corpus_dir. By default it must be there already.
download_corpus() {
    [[ -d $corpus_dir ]] || die "there is no $corpus_dir, and egs/$corpus/corpus.sh does not say how to download it"
}

# Prints what download_corpus writes, a line PATH=GB for each file and folder, as far as that is known.
download_sizes() { :; }

# prepare_manifests SPLIT RECORDINGS SUPERVISIONS: writes the two manifests of a split, from own data if corpus_from is set,
# else by Lhotse's recipe
prepare_manifests() {
    if [[ -n $corpus_from ]]; then
        run_python local/manifests_from_source.py --from "$corpus_from" "${source_options[@]}" --split "$1" \
            --recordings "$2" --supervisions "$3" "${common_flags[@]}"
    else
        manifests_from_recipe "$@"
    fi
}

# manifests_from_recipe SPLIT RECORDINGS SUPERVISIONS [OPTIONS...]
manifests_from_recipe() {
    run_python local/manifests_from_recipe.py --recipe "$lhotse_recipe" --corpus-dir "$corpus_dir" --split "$1" \
        --num-jobs "$num_jobs" --recordings "$2" --supervisions "$3" "${@:4}" "${common_flags[@]}"
}

# Prints words, one per line, that the lexicon holds besides those of the training text.
extra_words() { :; }

# The interpreter of .venv, which setup.sh makes, or the one that SPLITFORMER_PYTHON names.
python=${SPLITFORMER_PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

check_python() {
    [[ -x $(command -v "$python") ]] || die "there is no $python; run ./setup.sh first"
}

# Runs a program of a stage.
run_python() {
    check_python
    supervise "$python" "$@"
}

# Runs a short program; its output is the result.
ask_python() {
    check_python
    "$python" "$@"
}

# check_machine STAGE...: whether this machine has what the stages need: packages, GPU, disk, shared memory. It is asked before
# the first stage. `doctor_flags`: further options.
doctor_flags=()
check_machine() {
    [[ $skip_checks == false ]] || return 0
    local flags=(--quiet --stages "$@" --graphs "$graphs" --fbank "$fbank" --num-mel-bins "$num_mel_bins")
    local size split hours copies
    if contains download "$@"; then
        while read -r size; do flags+=(--store-gigabytes "$size"); done < <(download_sizes)
    fi
    for hours in $(! contains fbank "$@" || [[ -n $limit_utterances ]] || echo "$split_hours"); do
        split=${hours%=*} copies=1
        contains "$split" "${splits[@]}" || continue
        [[ ! -f $(done_file "$(cuts_of "$split")") ]] || continue
        if contains "$split" "${train_list[@]}"; then
            [[ $on_the_fly == false && $decode_only == false ]] || continue
            [[ $speed_perturb == false ]] || copies=3
            [[ -z $shar ]] || flags+=(--store-hours "$(train_artefact_of "$split")=${hours#*=}")
        fi
        for ((; copies > 0; copies--)); do flags+=(--store-hours "$(features_of "$split")=${hours#*=}"); done
    done
    ask_python -m splitformer.bin.doctor "${flags[@]}" "${doctor_flags[@]}" ||
        die "stopped before the first stage, see above; --skip-checks runs the stages all the same"
}

load_corpus() {
    local description=egs/$corpus/corpus.sh each names=()
    for each in egs/*/corpus.sh; do names+=("$(basename "$(dirname "$each")")"); done
    contains "$corpus" "${names[@]}" ||
        option_error "unknown corpus '$corpus'; there are: ${names[*]}.$(did_you_mean "$corpus" "${names[@]}")"

    # paths on the command line are relative to the user's working directory; the drivers run in the repository's root
    [[ -z $work_dir ]] || given[work_dir]=$(absolute_path "$work_dir")
    if [[ -n $bpe_model ]]; then
        bpe_model=$(absolute_path "$bpe_model")
        given[bpe_model]=$bpe_model
        [[ -f $bpe_model ]] || option_error "--bpe-model: there is no $bpe_model"
    fi
    if [[ -n $musan_dir ]]; then
        musan_dir=$(absolute_path "$musan_dir")
        given[musan_dir]=$musan_dir
        [[ -d $musan_dir ]] || option_error "--musan-dir: there is no folder $musan_dir"
    fi
    [[ -z $download_dir ]] || given[download_dir]=$(absolute_path "$download_dir")
    work_dir=${given[work_dir]:-egs/$corpus}
    download_dir=${given[download_dir]:-$work_dir/download}
    check_number limit_utterances empty
    data_dir=$work_dir/data${limit_utterances:+/limit-$limit_utterances}
    corpus_dir=$data_dir/corpus # the description may name another

    read_description "$description"
    read -ra subset_list <<<"$subsets"
    [[ -z $subset ]] || contains "$subset" "${subset_list[@]}" ||
        option_error "unknown subset '$subset'; egs/$corpus has: ${subsets:-no subsets}"
    reapply_options
    read -ra graph_list <<<"$graphs"
    for each in "${graph_list[@]}"; do
        contains "$each" HLG LG G words none || option_error "--graphs '$graphs': choose among HLG, LG, G, or words, or none"
    done
    [[ $estimate_lm == false ]] || lm_arpa_url='' rescore_lm_arpa_url=''
    rescore_lm_order=${rescore_lm_order:-$lm_order}
    # language models of one order are one file
    [[ $rescore_lm_order != "$lm_order" ]] || rescore_lm_arpa_url=$lm_arpa_url
    [[ ! -v "given[train_splits]" ]] || subset_tag+=_${train_splits// /+}
    [[ -z $lm_prune || $lm_prune =~ ^[0-9]*\.?[0-9]+([eE]-?[0-9]+)?$ ]] ||
        option_error "--lm-prune is '$lm_prune'; it takes a number such as 1e-7"
    check_choice token_type bpe char
    check_choice speed_perturb true false
    check_choice fbank lhotse kaldifeat linear-mel
    [[ -z $shar ]] || check_choice shar numpy lilcom
    [[ -z $shar || $on_the_fly == false ]] ||
        option_error "--shar packs stored features, --on-the-fly stores none for training data; choose one of them"
    for each in vocab_size lm_order rescore_lm_order num_mel_bins num_jobs; do check_number "$each"; done
    for each in train_splits dev_splits test_splits; do
        [[ -n ${!each} ]] || option_error "$description sets no $each"
    done

    read -ra train_list <<<"$train_splits"
    # Decoding needs only the text of the training data, for tokens, words and the language model.
    no_training_data=false
    if [[ $decode_only == true && -n $bpe_model && -n $lm_arpa_url && -n $rescore_lm_arpa_url ]]; then
        no_training_data=true
        train_list=()
    fi
    read -ra dev_list <<<"$dev_splits"
    read -ra test_list <<<"$test_splits"
    splits=()
    for each in "${train_list[@]}" "${dev_list[@]}" "${test_list[@]}"; do
        contains "$each" "${splits[@]}" || splits+=("$each") # one split may serve twice
        [[ -z $corpus_from ]] || contains "$each" train dev test ||
            option_error "unknown split '$each'; own data have: train dev test"
    done
    locked_folders=("$data_dir")
    manifests_dir=$data_dir/manifests
    place_features
    lm_dir=$data_dir/lm$subset_tag
    [[ $no_training_data == false ]] || lm_dir+=_decode
    train_text=$lm_dir/train.txt
    arpa=$lm_dir/${lm_order}gram.arpa
    graph_arpa=$arpa
    [[ -z $lm_prune ]] || graph_arpa=${arpa%.arpa}-pruned-$lm_prune.arpa
    rescore_arpa=$lm_dir/${rescore_lm_order}gram.arpa
    lang_dir=$data_dir/lang_$token_type
    [[ $token_type == char ]] || lang_dir+=_$vocab_size
    [[ -z $bpe_model ]] || lang_dir=$data_dir/lang_given_$(checksum "$bpe_model" | cut -c 1-8)
    lang_dir+=$subset_tag
    [[ $no_training_data == false ]] || lang_dir+=_decode

    common_flags=()
    [[ -z $limit_utterances ]] || common_flags+=(--limit-utterances "$limit_utterances")
    [[ $strict == false ]] || common_flags+=(--strict)
}

# read_description FILE: sources a corpus.sh; an unknown variable or function that does not begin with own_ is an error
read_description() {
    local _known _new
    _known=$(compgen -v; compgen -A function)
    # shellcheck source=/dev/null
    source "$1"
    _new=$( (compgen -v; compgen -A function) | grep -vxF "$_known" | grep -vE '^(own_|_|[A-Z_]+$)' | head -n 1 || :)
    [[ -z $_new ]] || die "$1: unknown variable '$_new'.$(did_you_mean "$_new" "${corpus_options[@]}" \
        corpus_dir corpus_source corpus_from source_options lhotse_recipe lm_arpa_url rescore_lm_arpa_url default_config \
        subsets subset_tag notice tune_sets split_hours download_sizes download_corpus prepare_manifests extra_words)" \
        "local/corpus.sh lists the variables; a corpus's own begin with own_"
}

# Sets the folders of features; run.sh calls it again after it has read the configuration.
place_features() {
    fbank_dir=$data_dir/fbank
    [[ $fbank == lhotse ]] || fbank_dir+=_$fbank
    [[ $num_mel_bins == 80 ]] || fbank_dir+=_$num_mel_bins
}

# state_of PATH: a checksum of a file's contents, or of the names, sizes and times of a folder's files
state_of() {
    if [[ -d $1 ]]; then
        find -L "$1" -type f -printf '%P %s %T@\n' | LC_ALL=C sort | sha256sum | cut -c 1-16
    else
        [[ -f $1 ]] || die "there is no $1, the source in egs/$corpus/corpus.sh; restore it, or run local/new_corpus.sh again"
        checksum "$1"
    fi
}

absolute_path() {
    if [[ $1 == /* ]]; then echo "$1"; else echo "$called_from/$1"; fi
}

recordings_of() { echo "$manifests_dir/${1}_recordings.jsonl.gz"; }
supervisions_of() { echo "$manifests_dir/${1}_supervisions.jsonl.gz"; }
features_of() { echo "$fbank_dir/${1}_feats"; }
cuts_of() { echo "$fbank_dir/${1}_cuts.jsonl.gz"; }

# The artefact that holds a training split for training: cuts with features, Shar or not, or cuts without features.
train_artefact_of() {
    if [[ $on_the_fly == true ]]; then
        echo "$data_dir/audio_cuts/${1}_cuts.jsonl.gz"
    elif [[ -n $shar ]]; then
        echo "$fbank_dir/${1}_shar_$shar"
    else
        cuts_of "$1"
    fi
}

# The path in it that training reads. Lhotse's reader takes every file of a Shar folder for a shard, .done too.
train_cuts_of() {
    if [[ -n $shar ]]; then echo "$(train_artefact_of "$1")/shards"; else train_artefact_of "$1"; fi
}

# dev_set_of TEST: the dev set on which choices for a test set are made
dev_set_of() {
    local each
    for each in $tune_sets; do
        if [[ ${each%%=*} == "$1" ]] && contains "${each#*=}" "${dev_list[@]}"; then
            echo "${each#*=}"
            return
        fi
    done
    echo "${dev_list[0]}"
}

# Noise is a split of this name; it is never packed as Shar.
noise_split=musan
noise_cuts_of() {
    if [[ $on_the_fly == true ]]; then train_artefact_of "$noise_split"; else cuts_of "$noise_split"; fi
}
