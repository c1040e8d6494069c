#!/usr/bin/env bash
# The whole recipe: set-up, data preparation, training, averaging, decoding at every exit, report.
# A second run does nothing, and an interrupted run resumes where it stopped.
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

config='' seed=42 exp_dir='' policy='' max_relative_wer=0.05 stage=0 stop_stage=report publish=false
# shellcheck disable=SC2034  # train_system and stage_decode name them
{
    num_processes='' num_workers='' accum_grad='' precision='' timeout_minutes='' index_dir=''
    hlg_scales=() ngram_lm_scales=() blank_penalties=()
}
checkpoint='' word_list='' init_from='' freeze_encoder_layers=''
methods=() set=()
value_options=(config seed num_processes num_workers accum_grad precision timeout_minutes index_dir exp_dir policy
    max_relative_wer stage stop_stage checkpoint word_list init_from freeze_encoder_layers "${corpus_options[@]}")
flag_options=(publish "${corpus_flags[@]}")
list_options=(methods set hlg_scales ngram_lm_scales blank_penalties)
prepare_stages=(download manifests fbank bpe lang lm graphs)

usage() {
    cat <<END
usage: ./run.sh [options]

  --config NAME            a conf of egs/CORPUS/conf/, or a TOML file (default: as the corpus says)
  --set SECTION.KEY=VALUE ...
                           override values of the conf
  --seed N                 (default: 42)
  --num-processes N        training processes (default: one per GPU; without a GPU 2, if there are 2 cores)
  --num-workers N          processes that load training data, per training process (default: a GPU's share of the
                           cores, up to 16; without a GPU 1)
  --accum-grad N           micro-batches into which a training process divides its share of a batch, to save memory
  --precision auto|bf16|fp16|fp32
                           number format of products in training (default: auto, by the device)
  --timeout-minutes X      minutes after which training processes stop waiting for one another (default: 30)
  --index-dir DIR          folder for the index of the training cuts, if the data cannot be written to
  --exp-dir DIR            folder for checkpoints and decoding (default: WORK_DIR/exp/CONFIG-seedN)
  --methods NAME ...       decoding methods of docs/decoding.md (default: greedy_search, ctc-decoding and 1best for CTC alone;
                           all methods for a system with a transducer)
  --hlg-scales X ..., --ngram-lm-scales X ..., --blank-penalties X ...
                           values to tune on the dev set: weights of the language model for CTC and for a transducer, and
                           blank penalties; with one value each, nothing is tuned, which is faster
  --checkpoint FILE        decode this checkpoint instead of training one; its tokens are the bpe.model beside it, unless
                           --bpe-model is given; implies --decode-only
  --init-from FILE         start training from the weights of this checkpoint; if its tokens differ, the heads are new
  --freeze-encoder-layers N
                           with --init-from: do not train the front end and the first N encoder layers
  --word-list FILE         words of greedy_search+lexicon (default: the corpus's lexicon)
  --policy NAME            exit policy of docs/dynamic_exits.md to fit and to decode with (default: learned_nbest)
  --max-relative-wer X     errors that the policy may add, as a share of the last exit's (default: 0.05)
  --publish                update the committed results of egs/CORPUS (RESULTS.md, results/, plots); by default, results go
                           to WORK_DIR/exp
$corpus_usage
  --stage A, --stop-stage B
                           first and last stage, by number or name: 0 to 6 are those of prepare.sh, 7 train, 8 average,
                           9 decode, 10 early_exit, 11 report
END
}

# 0 to 6: prepare.sh, with the options given
run_prepare() {
    local name options=(--corpus "$corpus" --stage "$first_stage" --graphs "$graphs")
    ((last_stage < ${#prepare_stages[@]})) && options+=(--stop-stage "$last_stage")
    for name in "${corpus_options[@]}"; do
        if [[ $name != corpus && $name != graphs && -v "given[$name]" ]]; then
            options+=("--${name//_/-}" "${given[$name]}")
        fi
    done
    for name in "${corpus_flags[@]}"; do
        [[ ${!name} == false ]] || options+=("--${name//_/-}")
    done
    supervise ./prepare.sh "${options[@]}"
}

# 7: training, unless a checkpoint is given
stage_train() {
    if [[ -n $checkpoint ]]; then
        log "nothing to train: --checkpoint is $checkpoint"
    else
        train_system
    fi
}

# The fingerprint of a run is kept in its folder when it starts: a run cannot resume with other data or another configuration.
train_system() {
    local split train_cuts=() artefacts=() dev_cuts=() flags=() started_from=$exp_dir/.started-from
    local cuts tokens fingerprint noise name
    for split in "${train_list[@]}"; do
        train_cuts+=("$(train_cuts_of "$split")")
        artefacts+=("$(train_artefact_of "$split")")
    done
    for split in "${dev_list[@]}"; do dev_cuts+=("$(cuts_of "$split")"); done
    cuts=$(fingerprint_of "${artefacts[@]}" "${dev_cuts[@]}")
    tokens=$(fingerprint_of "$lang_dir/bpe.model")
    fingerprint=$(printf '%s\n' "seed $seed" "cuts $cuts" "tokens $tokens" ${initial:+"initial $initial"} \
        "$resolved_config")
    if [[ -n $musan_dir ]]; then
        noise=$(fingerprint_of "$(noise_cuts_of)")
        fingerprint+=$'\n'"noise $noise"
        flags+=(--noise-cuts "$(noise_cuts_of)")
    fi
    [[ $on_the_fly == false ]] || flags+=(--on-the-fly)
    for name in num_workers accum_grad precision timeout_minutes index_dir; do
        [[ -z ${!name} ]] || flags+=("--${name//_/-}" "${!name}")
    done
    if [[ ! -f $started_from ]]; then
        mkdir -p "$exp_dir"
        write_line "$started_from" "$fingerprint"
    elif [[ $(without_length <"$started_from") != "$(without_length <<<"$fingerprint")" ]]; then
        die "$exp_dir holds a run that started from other data or another configuration (<: then, >: now):
$(diff "$started_from" - <<<"$fingerprint" | grep '^[<>]')
remove the folder to train again, or give this run another --seed or --exp-dir"
    fi
    make_artefact "$exp_dir/training.jsonl" "$fingerprint" run_training \
        --config "$config_path" --exp-dir "$exp_dir" --train-cuts "${train_cuts[@]}" --dev-cuts "${dev_cuts[@]}" \
        --lang-dir "$lang_dir" --seed "$seed" --resume "${flags[@]}" "${initial_flags[@]}" "${set_flags[@]}"
}

# A run may be made longer than it was planned.
without_length() { grep -v '"num_epochs":'; }

run_training() {
    local gpus processes=$num_processes
    gpus=$(ask_python -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus == 0)); then export OMP_NUM_THREADS=1; fi # one process per core is faster than one with many threads
    if [[ -z $processes ]]; then
        if ((gpus > 0)); then processes=$gpus; else processes=$(($(cores) >= 2 ? 2 : 1)); fi
    fi
    log "training in $processes processes, on $gpus GPUs"
    run_python -m splitformer.bin.train --num-processes "$processes" "$@"
}

# 8: the mean of the weights over the last epochs, or the given checkpoint
stage_average() {
    local training
    if [[ -n $checkpoint ]]; then
        training=$(checksum "$checkpoint")
        make_artefact "$exp_dir/averaged.pt" "$(printf '%s\n' "checkpoint $training" "$resolved_config")" \
            run_python local/use_checkpoint.py --checkpoint "$checkpoint" --config "$config_path" "${set_flags[@]}" \
            --output "$exp_dir/averaged.pt"
        return
    fi
    training=$(fingerprint_of "$exp_dir/training.jsonl")
    make_artefact "$exp_dir/averaged.pt" "training $training" \
        run_python -m splitformer.bin.average --exp-dir "$exp_dir"
}

# 9: every exit by every method; dev sets too, on which choices are made
stage_decode() {
    local name split model sets inputs='' words='' choices cuts=() names=() choice_flags=(--methods "${methods[@]}")
    [[ -z $notice ]] || choice_flags+=(--notice "$notice")
    for name in hlg_scales ngram_lm_scales blank_penalties; do
        local -n values=$name
        ((${#values[@]} == 0)) || choice_flags+=("--${name//_/-}" "${values[@]}")
    done
    if [[ -n $word_list ]]; then
        words=$(checksum "$word_list")
        choice_flags+=(--word-list "$word_list")
    fi
    for split in "${dev_list[@]}" "${test_list[@]}"; do
        contains "$split" "${names[@]}" && continue # one split may serve as both
        names+=("$split")
        cuts+=("$split=$(cuts_of "$split")")
    done
    model=$(fingerprint_of "$exp_dir/averaged.pt")
    sets=$(fingerprint_of "${cuts[@]#*=}")
    for name in $graphs; do
        case $name in
            words) inputs+=" words $(fingerprint_of "$lang_dir/L_disambig.pt")" ;;
            none) ;;
            *) inputs+=" $name $(fingerprint_of "$lang_dir/$name.pt")" ;;
        esac
    done
    choices="${choice_flags[*]}${words:+ words $words}"
    choice_flags+=(--tune-set "${dev_list[0]}")
    for split in "${test_list[@]}"; do
        name=$(dev_set_of "$split")
        [[ $name == "${dev_list[0]}" ]] || { choice_flags+=("$split=$name") choices+=" $split=$name"; }
    done
    make_artefact "$exp_dir/decode" "model $model sets ${names[*]} $sets graphs$inputs choices $choices" \
        run_decoding --cuts "${cuts[@]}" "${choice_flags[@]}"
}

run_decoding() {
    rm -rf "$exp_dir/decode" # records of another model must not stay among the new ones
    run_python -m splitformer.bin.decode --checkpoint "$exp_dir/averaged.pt" "$@" --lang-dir "$lang_dir" \
        --output-dir "$exp_dir/decode" --corpus "$corpus"
}

# 10: exit policies, fitted on the dev set of each test set: WER against cost on the test set, and decoding with one of them.
# That of the first dev set is policy.json, that of another one policy-DEV.json.
stage_early_exit() {
    local split tests=() cuts=() model records sets name
    if ((num_exits == 1)); then
        log "skipping exit policies: the model has a single exit"
        return
    fi
    for split in "${test_list[@]}"; do
        if ! contains "$split" "${dev_list[@]}"; then
            tests+=("$split")
            cuts+=("$(cuts_of "$split")")
        fi
    done
    if ((${#tests[@]} == 0)); then
        log "skipping exit policies: no test set besides the dev sets"
        return
    fi
    model=$(fingerprint_of "$exp_dir/averaged.pt")
    records=$(fingerprint_of "$exp_dir/decode")
    for name in "${dev_list[@]:1}"; do
        if [[ -n $(tests_of "$name" "${tests[@]}") ]]; then cuts+=("$(cuts_of "$name")"); fi
    done
    sets=$(fingerprint_of "$(cuts_of "${dev_list[0]}")" "${cuts[@]}")
    compgen -G "$exp_dir/policy*.json" >/dev/null || [[ -f $exp_dir/early_exit/no-policy ]] ||
        rm -f "$exp_dir/early_exit/.done"
    make_artefact "$exp_dir/early_exit" "model $model records $records sets $sets policy $policy $max_relative_wer" \
        run_early_exit "${tests[@]}"
}

# tests_of DEV TEST...: those of the test sets for which choices are made on this dev set
tests_of() {
    local split
    for split in "${@:2}"; do
        if [[ $(dev_set_of "$split") == "$1" ]]; then echo "$split"; fi
    done
}

# run_early_exit TEST...
run_early_exit() {
    local name split cuts output
    rm -rf "$exp_dir/early_exit" "$exp_dir"/policy*.json
    mkdir -p "$exp_dir/early_exit"
    for name in "${dev_list[@]}"; do
        cuts=()
        for split in $(tests_of "$name" "$@"); do cuts+=("$split=$(cuts_of "$split")"); done
        output=$exp_dir/policy.json
        [[ $name == "${dev_list[0]}" ]] || output=$exp_dir/policy-$name.json
        if ((${#cuts[@]} > 0)); then fit_policy "$name" "$output" "${cuts[@]}"; fi
    done
}

# fit_policy DEV FILE TEST=CUTS...
# The recipe continues without exit policies if they cannot be fitted to these sets (status 3): the tables need none.
fit_policy() {
    local calibration common records=() status=0
    [[ -z $notice ]] || records=(--notice "$notice")
    calibration="$1=$(cuts_of "$1")"
    common=(--checkpoint "$exp_dir/averaged.pt" --lang-dir "$lang_dir")
    run_python -m splitformer.bin.tradeoff "${common[@]}" --cuts "$calibration" --test-cuts "${@:3}" \
        --output-dir "$exp_dir/early_exit" --corpus "$corpus" "${records[@]}" &&
        run_python -m splitformer.bin.calibrate "${common[@]}" --cuts "$calibration" --test-cuts "${@:3}" \
            --policy "$policy" --max-relative-wer "$max_relative_wer" --output "$2" &&
        run_python -m splitformer.bin.decode "${common[@]}" --cuts "${@:3}" --exit-policy "$2" \
            --output-dir "$exp_dir/early_exit" --corpus "$corpus" "${records[@]}" || status=$?
    if ((status == 3)); then
        log "could not fit an exit policy on $1 (see above); the report has none; remove $exp_dir/early_exit to retry"
        touch "$exp_dir/early_exit/no-policy"
    elif ((status > 0)); then
        die "exit policies were not fitted, see above"
    fi
}

# 11: tables and plots of all runs
stage_report() {
    local published=egs/$corpus/published.toml each flags=() records inputs dev_only=()
    for each in "${dev_list[@]}"; do
        contains "$each" "${test_list[@]}" || dev_only+=("$each") # a corpus without a test set reports its dev set
    done
    if [[ -f $published ]]; then flags+=(--published "$published"); fi
    records=("$exp_root"/*/decode/*.json)
    for each in "$exp_root"/*/training.jsonl "$exp_root"/*/early_exit/*.json "egs/$corpus"/results/*.json; do
        [[ ! -f $each ]] || records+=("$each")
    done
    inputs=$(checksum "${records[@]}" "${flags[@]:1}")
    if [[ $publish == true ]]; then
        run_report --publish "egs/$corpus" "${flags[@]}"
        return
    fi
    if [[ -z $variant && -d egs/$corpus/results ]]; then flags+=(--committed "egs/$corpus"); fi
    make_artefact "$exp_root/RESULTS.md" "records $inputs" run_report --output-dir "$exp_root" "${flags[@]}"
}

run_report() {
    run_python -m splitformer.bin.report --corpus "$corpus" --exp-root "$exp_root" --dev-sets "${dev_only[@]}" "$@"
}

# Checks that --fbank computes the features that the configuration names.
choose_features() {
    if [[ $features == linear-mel && ! -v "given[fbank]" ]]; then
        given[fbank]=linear-mel
        fbank=linear-mel
    fi
    if [[ $features == linear-mel && $fbank != linear-mel || $features == fbank && $fbank == linear-mel ]]; then
        option_error "--fbank $fbank does not compute the features of this configuration, whose data.features is" \
            "$features; leave --fbank out, or give a conf or --set data.features=... that fits"
    fi
    place_features
}

# Checks that augment.noise_p and --musan-dir agree.
check_noise() {
    if [[ -n $checkpoint ]] || ((first_stage > 7 || last_stage < 7)); then return; fi # nothing is trained
    if [[ $noise_p != 0.0 && -z $musan_dir ]]; then
        option_error "augment.noise_p is $noise_p, but no noise is given: add --musan-dir DIR, a" \
            "folder with MUSAN's folders music, noise and speech, or --set augment.noise_p=0"
    fi
    if [[ $noise_p == 0.0 && -n $musan_dir ]]; then
        option_error "--musan-dir is given, but augment.noise_p is 0, so no noise would be mixed in: add" \
            "--set augment.noise_p=0.5, for instance, or leave --musan-dir out"
    fi
}

# check_checkpoint NAME: the file that the option names is a checkpoint, which torch writes as a zip archive
check_checkpoint() {
    [[ -f ${!1} ]] || option_error "--${1//_/-}: there is no ${!1}"
    [[ $(head -c 2 "${!1}" | tr -d '\0') == PK ]] ||
        option_error "--${1//_/-}: ${!1} is no checkpoint; give one such as EXP/averaged.pt"
}

# Reads the options that concern checkpoints of other runs.
choose_checkpoints() {
    local beside
    [[ -z $checkpoint || -z $init_from ]] ||
        option_error "--checkpoint decodes without training, --init-from trains; give one of them"
    if [[ -n $checkpoint ]]; then
        checkpoint=$(absolute_path "$checkpoint")
        check_checkpoint checkpoint
        decode_only=true
        beside=$(dirname "$checkpoint")/bpe.model
        if [[ -z $bpe_model && -f $beside ]]; then bpe_model=$beside; fi
    elif [[ $decode_only == true ]]; then
        option_error "--decode-only makes no features to train on: give a --checkpoint, or prepare with ./prepare.sh"
    fi
    initial='' initial_flags=()
    check_number freeze_encoder_layers empty
    if [[ -n $init_from ]]; then
        init_from=$(absolute_path "$init_from")
        check_checkpoint init_from
        initial=init-$(checksum "$init_from" | cut -c 1-8)
        initial_flags=(--init-from "$init_from")
    elif [[ -n $freeze_encoder_layers ]]; then
        option_error "--freeze-encoder-layers freezes layers with random weights unless --init-from is given"
    fi
    if [[ -n $freeze_encoder_layers ]]; then
        initial+=-freeze-$freeze_encoder_layers
        initial_flags+=(--freeze-encoder-layers "$freeze_encoder_layers")
    fi
}

# Sets config_path, and the name and folders of the run.
choose_run() {
    local each choices=''
    config=${config:-$default_config}
    if [[ $config == *.toml ]]; then
        config_path=$(absolute_path "$config")
        [[ -f $config_path ]] || option_error "--config: there is no $config_path"
        config=$(basename "$config" .toml)
    else
        config_path=egs/$corpus/conf/$config.toml
    fi
    if [[ ! -f $config_path ]]; then
        for each in "egs/$corpus/conf"/*.toml; do choices+=" $(basename "$each" .toml)"; done
        # shellcheck disable=SC2086  # words
        option_error "unknown config '$config'; egs/$corpus/conf has:$choices.$(did_you_mean "$config" $choices)"
    fi
    set_flags=()
    system=$config
    if ((${#set[@]})); then set_flags=(--set "${set[@]}"); fi
    for each in "${set[@]}"; do system+=+${each//[^A-Za-z0-9._=-]/_}; done
    system+=${initial:++$initial}
    ((${#system} <= 100)) || system=$config+$(printf '%s\n' "${set[@]}" ${initial:+"$initial"} | sha256sum | cut -c1-8)
    variant=${subset_tag#_}${limit_utterances:+limit-$limit_utterances} # not the corpus as it is published
    exp_root=$work_dir/exp${variant:+/$variant}
    if [[ -n $exp_dir ]]; then
        exp_dir=$(absolute_path "$exp_dir")
        exp_root=$(dirname "$exp_dir")
    else
        exp_dir=$exp_root/$system
        [[ -n $checkpoint ]] || exp_dir+=-seed$seed # decoding a checkpoint draws nothing at random
    fi
    [[ $publish == false || -z $variant ]] || option_error "--publish: results of ${variant} are not those of the corpus"
}

# Checks configuration, methods and policy before hours of work, and sets what they decide.
plan_run() {
    local plan flags=("${set_flags[@]}")
    ((${#methods[@]} == 0)) || flags+=(--methods "${methods[@]}")
    [[ -z $policy ]] || flags+=(--policy "$policy")
    [[ -z $checkpoint ]] || flags+=(--released)
    plan=$(ask_python local/plan_run.py --config "$config_path" "${flags[@]}") || exit 2
    resolved_config=${plan#*$'\nconfig:\n'}
    local name value
    while IFS='=' read -r name value; do
        case $name in
            features) features=$value ;;
            noise_p) noise_p=$value ;;
            exits) num_exits=$value ;;
            heads) heads=$value ;;
            batch_seconds) batch_seconds=$value ;;
            methods) read -ra methods <<<"$value" ;;
            graphs) graphs=$value ;;
            policy) policy=$value ;;
        esac
    done <<<"${plan%%$'\nconfig:\n'*}"
}

# Checks the machine for all selected stages, those of prepare.sh included.
check_stages() {
    local name stages=()
    for name in "${stage_names[@]:first_stage:last_stage - first_stage + 1}"; do
        [[ $name == train && -n $checkpoint ]] || stages+=("$name")
    done
    if contains train "${stages[@]}" && [[ ! -f $(done_file "$exp_dir/training.jsonl") ]]; then
        doctor_flags+=(--batch-seconds "$batch_seconds" ${num_workers:+--num-workers "$num_workers"})
    fi
    [[ " $heads " != *" transducer "* ]] || doctor_flags+=(--transducer)
    ((${#stages[@]} == 0)) || check_machine "${stages[@]}"
    skip_checks=true # prepare.sh need not ask again
}

# bash reads main to its end before it runs it, so that editing this file during a run does no harm.
main() {
    local name
    parse_options "$@"
    [[ ! -v "given[graphs]" ]] || option_error "--graphs is an option of prepare.sh; here the methods decide"
    select_stages "${prepare_stages[@]}" train average decode early_exit report
    choose_checkpoints
    if [[ -n $word_list ]]; then
        word_list=$(absolute_path "$word_list")
        [[ -f $word_list ]] || option_error "--word-list: there is no $word_list"
    fi
    load_corpus
    check_number seed zero
    for name in num_processes accum_grad; do check_number "$name" empty; done
    check_number num_workers empty zero
    [[ -z $timeout_minutes ]] || check_decimals timeout_minutes
    [[ -z $index_dir ]] || index_dir=$(absolute_path "$index_dir")
    [[ -z $precision ]] || check_choice precision auto bf16 fp16 fp32
    ((${#seed} <= 18)) || option_error "--seed $seed: at most 18 digits"
    for name in max_relative_wer hlg_scales ngram_lm_scales blank_penalties; do check_decimals "$name"; done
    choose_run

    # Skip set-up if SPLITFORMER_PYTHON is given.
    [[ -n ${SPLITFORMER_PYTHON:-} ]] || ./setup.sh
    plan_run
    choose_features
    check_noise

    check_stages
    if ((first_stage < ${#prepare_stages[@]})); then run_prepare; fi
    locked_folders+=("$exp_dir")
    if ((last_stage >= 7 && first_stage <= 10)) && [[ -d $data_dir ]]; then lock_folder shared "$data_dir"; fi
    for name in train average decode early_exit report; do run_stage "$name"; done
    if ((last_stage == 11)); then
        log "results are in $([[ $publish == true ]] && echo "egs/$corpus" || echo "$exp_root")/RESULTS.md"
    fi
}

main "$@"
exit
