#!/usr/bin/env bash
# Data preparation: from a corpus to features, tokens and decoding graphs. A second run does nothing.
# shellcheck disable=SC2329  # run_stage and make_artefact call the functions
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=local/parse_options.sh
source local/parse_options.sh
# shellcheck source=local/stages.sh
source local/stages.sh
corpus=mini
# shellcheck source=local/corpus.sh
source local/corpus.sh

stage=0 stop_stage=6 shard=''
value_options=(shard stage stop_stage "${corpus_options[@]}")
flag_options=("${corpus_flags[@]}")
list_options=()

usage() {
    cat <<END
usage: ./prepare.sh --corpus NAME [options]

$corpus_usage
  --shard I/N              compute the I-th of N shares of the features, in one of N processes on any machines that share the
                           folder, such as a Slurm array; run without it then, which collects them. Needs --stage fbank
                           --stop-stage fbank
  --stage A, --stop-stage B
                           first and last stage, by number or name: 0 download, 1 manifests, 2 fbank, 3 bpe, 4 lang, 5 lm,
                           6 graphs
END
}

# 0: the corpus's audio and transcripts
stage_download() {
    local stamp=$data_dir/corpus_dir # not in the corpus's folder, which may be read-only
    [[ -d $corpus_dir ]] || rm -f "$stamp"
    make_artefact "$stamp" "corpus $corpus_dir source $corpus_source splits ${splits[*]}" bring_corpus "$stamp"
}

bring_corpus() {
    download_corpus
    [[ -d $corpus_dir ]] || die "download_corpus of egs/$corpus/corpus.sh did not make $corpus_dir"
    write_line "$1" "$corpus_dir"
}

# 1: Lhotse manifests of the corpus and of the noise, validated
stage_manifests() {
    local split
    if [[ -n $musan_dir && $decode_only == false ]]; then
        make_artefact "$(supervisions_of "$noise_split")" "musan $musan_dir options ${common_flags[*]:-}" make_noise
    fi
    for split in "${splits[@]}"; do
        make_artefact "$(supervisions_of "$split")" \
            "corpus $corpus_dir source $corpus_source split $split options ${common_flags[*]:-}" make_manifests "$split"
    done
}

make_manifests() {
    prepare_manifests "$1" "$(recordings_of "$1")" "$(supervisions_of "$1")"
    check_manifests "$1"
}

make_noise() {
    run_python local/manifests_from_musan.py --musan-dir "$musan_dir" --recordings "$(recordings_of "$noise_split")" \
        --supervisions "$(supervisions_of "$noise_split")" "${common_flags[@]}"
    check_manifests "$noise_split"
}

check_manifests() {
    run_python local/validate_cuts.py --recordings "$(recordings_of "$1")" --supervisions "$(supervisions_of "$1")" \
        "${strict_flag[@]}"
}

# 2: features; with speed_perturb those of training data also at 0.9 and 1.1 times the speed. With --on-the-fly, training
# data get cuts without features.
stage_fbank() {
    local split perturb fingerprint
    for split in "${splits[@]}"; do
        perturb=false
        if ! contains "$split" "${dev_list[@]}" "${test_list[@]}"; then
            [[ $decode_only == false && $on_the_fly == false ]] || continue
        fi
        if [[ $on_the_fly == false ]] && contains "$split" "${train_list[@]}"; then perturb=$speed_perturb; fi
        store_features "$split" "$perturb"
    done
    [[ $decode_only == false && -z $shard ]] || return 0
    for split in "${train_list[@]}"; do
        if [[ $on_the_fly == true ]]; then store_cuts "$split" "$speed_perturb"; fi
        if [[ -n $shar ]]; then
            fingerprint=$(fingerprint_of "$(cuts_of "$split")")
            make_artefact "$(train_artefact_of "$split")" "cuts $fingerprint" make_shar "$split"
        fi
    done
    if [[ -n $musan_dir ]]; then
        if [[ $on_the_fly == true ]]; then store_cuts "$noise_split" false; else store_features "$noise_split" false; fi
    fi
}

# store_features SPLIT SPEED_PERTURBATION
store_features() {
    local inputs fingerprint cuts
    cuts=$(cuts_of "$1")
    inputs=$(checksum "$(recordings_of "$1")" "$(supervisions_of "$1")")
    fingerprint="manifests $inputs fbank $fbank mel bins $num_mel_bins speed perturbation $2 strict $strict"
    if is_made "$cuts" "$fingerprint" && ! has_features "$1"; then
        log "features of $1 are missing in $(features_of "$1"); computing them again"
        lock_folder exclusive "$data_dir"
        rm -f "$(done_file "$cuts")"
    fi
    if [[ -n $shard ]]; then
        if is_made "$cuts" "$fingerprint"; then return; fi
        lock_folder shared "$data_dir" # for all processes that compute a share
        make_fbank "$1" "$2"
    else
        make_artefact "$cuts" "$fingerprint" make_fbank "$1" "$2"
    fi
}

# has_features SPLIT: whether the stored features are those that the fbank stage left. Features that were packed as Shar
# are not needed any more.
has_features() {
    local folder shar_folder
    folder=$(features_of "$1")
    if [[ -n $shar ]]; then
        shar_folder=$(train_artefact_of "$1")
        if is_made "$shar_folder" "cuts $(fingerprint_of "$(cuts_of "$1")")"; then return 0; fi
    fi
    [[ -d $folder ]] || return 1
    [[ ! -f $folder/.contents || $(contents_of "$folder") == "$(<"$folder/.contents")" ]] # earlier versions wrote none
}

# contents_of FOLDER: the number of its files, and their bytes
contents_of() {
    find "$1" -type f -not -name .contents -printf '%s\n' | awk '{ bytes += $1 } END { printf "%d %.0f", NR, bytes }'
}

# store_cuts SPLIT SPEED_PERTURBATION
store_cuts() {
    local inputs
    inputs=$(checksum "$(recordings_of "$1")" "$(supervisions_of "$1")")
    make_artefact "$(train_artefact_of "$1")" "manifests $inputs speed perturbation $2" make_cuts "$1" "$2"
}

make_cuts() {
    local flags=()
    [[ $2 == false ]] || flags+=(--speed-perturb)
    run_python local/make_cuts.py --recordings "$(recordings_of "$1")" --supervisions "$(supervisions_of "$1")" \
        --output-cuts "$(train_artefact_of "$1")" "${flags[@]}"
}

make_shar() {
    run_python local/export_shar.py --cuts "$(cuts_of "$1")" --output-dir "$(train_cuts_of "$1")" --packing "$shar"
}

make_fbank() {
    local flags=("${strict_flag[@]}")
    [[ $2 == false ]] || flags+=(--speed-perturb)
    run_python local/compute_fbank.py --recordings "$(recordings_of "$1")" --supervisions "$(supervisions_of "$1")" \
        --output-cuts "$(cuts_of "$1")" --storage-dir "$(features_of "$1")" \
        --num-jobs "$num_jobs" --fbank "$fbank" --num-mel-bins "$num_mel_bins" --executor "$executor" \
        ${shard:+--shard "$shard"} "${flags[@]}"
    if [[ -z $shard ]]; then
        write_line "$(features_of "$1")/.contents" "$(contents_of "$(features_of "$1")")"
    fi
}

# needs NAME...: whether one of these graphs (HLG, LG, G, or words for the lexicon) is to be made
needs() {
    local each
    for each in "$@"; do ! contains "$each" "${graph_list[@]}" || return 0; done
    return 1
}

# 3: tokens
stage_bpe() {
    local split inputs fingerprint supervisions=()
    if [[ $no_training_data == true ]]; then
        make_artefact "$train_text" "no training data" touch "$train_text"
    else
        for split in "${train_list[@]}"; do supervisions+=("$(supervisions_of "$split")"); done
        inputs=$(checksum "${supervisions[@]}")
        make_artefact "$train_text" "manifests $inputs" \
            run_python local/export_text.py --supervisions "${supervisions[@]}" --output "$train_text"
    fi
    if needs HLG LG G words; then
        make_artefact "$extra_words_file" "corpus $corpus source $corpus_source lm $lm_arpa_url" make_extra_words
    fi
    if [[ -n $bpe_model ]]; then
        inputs=$(checksum "$bpe_model")
        make_artefact "$lang_dir/bpe.model" "given $inputs" \
            run_python local/train_bpe.py --bpe-model "$bpe_model" --lang-dir "$lang_dir"
        return
    fi
    inputs=$(checksum "$train_text")
    fingerprint="text $inputs $token_type"
    [[ $token_type == char ]] || fingerprint+=" $vocab_size"
    make_artefact "$lang_dir/bpe.model" "$fingerprint" \
        run_python local/train_bpe.py --text "$train_text" --lang-dir "$lang_dir" --model-type "$token_type" \
        "${vocab_flag[@]}"
}

# With --limit-utterances, the text may lack letters that the corpus's own dictionary has: it is left out.
make_extra_words() {
    if [[ -z $limit_utterances || $no_training_data == true ]]; then extra_words; fi >"$extra_words_file.tmp"
    mv -f "$extra_words_file.tmp" "$extra_words_file"
}

# 4: lexicon and lexicon transducers
stage_lang() {
    local tokens words
    needs HLG LG G words || return 0
    tokens=$(fingerprint_of "$lang_dir/bpe.model")
    words=$(checksum "$train_text" "$extra_words_file")
    make_artefact "$lang_dir/L_disambig.pt" "tokens $tokens words $words" \
        run_python local/prepare_lang.py --lang-dir "$lang_dir" --text "$train_text" --extra-words "$extra_words_file"
}

# 5: n-gram language models, downloaded or estimated from the training text: of HLG and LG, and of G; often the same
stage_lm() {
    local lm
    if needs HLG LG || { needs G && [[ $rescore_arpa == "$arpa" ]]; }; then make_lm "$arpa" "$lm_order" "$lm_arpa_url"; fi
    if needs HLG LG && [[ $graph_arpa != "$arpa" ]]; then
        lm=$(fingerprint_of "$arpa")
        make_artefact "$graph_arpa" "lm $lm threshold $lm_prune" \
            run_python local/prune_lm.py --arpa "$arpa" --threshold "$lm_prune" --output "$graph_arpa"
    fi
    if needs G && [[ $rescore_arpa != "$arpa" ]]; then make_lm "$rescore_arpa" "$rescore_lm_order" "$rescore_lm_arpa_url"; fi
}

# make_lm ARPA ORDER URL
make_lm() {
    local words
    if [[ -n $3 ]]; then
        make_artefact "$1" "url $3" \
            run_python local/fetch_archive.py --url "$3" --archive "$download_dir/${3##*/}" --unpack "$1"
    else
        words=$(checksum "$train_text" "$extra_words_file")
        make_artefact "$1" "order $2 words $words" \
            run_python local/estimate_lm.py --text "$train_text" --order "$2" --arpa "$1" \
            --extra-words "$extra_words_file"
    fi
}

# 6: the decoding graphs: HLG for CTC, G to rescore its lattices, LG for transducers
stage_graphs() {
    local name lang lm lm_of
    for name in HLG LG G; do
        needs "$name" || continue
        lm_of=$graph_arpa
        [[ $name != G ]] || lm_of=$rescore_arpa
        lang=$(fingerprint_of "$lang_dir/L_disambig.pt")
        lm=$(fingerprint_of "$lm_of")
        make_artefact "$lang_dir/$name.pt" "lang $lang lm $lm" \
            run_python local/compile_graphs.py --lang-dir "$lang_dir" --arpa "$lm_of" --graph "$name"
    done
}

# bash reads main to its end before it runs it, so that editing this file during a run does no harm.
main() {
    parse_options "$@"
    select_stages download manifests fbank bpe lang lm graphs
    [[ -z $shard || $first_stage/$last_stage == 2/2 ]] || option_error "--shard needs --stage fbank --stop-stage fbank"
    load_corpus
    extra_words_file=$lm_dir/extra_words.txt
    strict_flag=()
    [[ $strict == false ]] || strict_flag=(--strict)
    vocab_flag=()
    [[ $token_type == char ]] || vocab_flag=(--vocab-size "$vocab_size")

    check_machine "${stage_names[@]:first_stage:last_stage - first_stage + 1}"
    for name in "${stage_names[@]}"; do run_stage "$name"; done
    log "$corpus: stages $first_stage to $last_stage are done; the data are in $data_dir"
}

main "$@"
exit
