#!/usr/bin/env bash
# The whole recipe: set-up, data preparation, training, averaging, decoding at every exit, report.
# A second run does nothing, and one that was interrupted goes on where it stopped.
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

config='' seed=42 exp_dir='' policy=learned_nbest max_relative_wer=0.05 stage=0 stop_stage=report
# shellcheck disable=SC2034  # train_system names them
num_processes='' num_workers='' accum_grad='' precision=''
checkpoint='' word_list='' init_from='' freeze_encoder_layers=''
known_methods=(greedy_search greedy_search+lexicon prefix_beam_search ctc-decoding 1best nbest nbest-rescoring
    whole-lattice-rescoring nbest-oracle transducer-greedy_search modified_beam_search fast_beam_search
    fast_beam_search_nbest fast_beam_search_nbest_LG)
known_policies=(entropy entropy_non_blank posterior nbest_posterior patience learned learned_nbest budget deadline fixed)
methods=() set=() hlg_scales=() ngram_lm_scales=() blank_penalties=()
value_options=(config seed num_processes num_workers accum_grad precision exp_dir policy max_relative_wer stage
    stop_stage checkpoint word_list init_from freeze_encoder_layers "${corpus_options[@]}")
flag_options=("${corpus_flags[@]}")
list_options=(methods set hlg_scales ngram_lm_scales blank_penalties)
prepare_stages=(download manifests fbank bpe lang lm graphs)

usage() {
    cat <<END
usage: ./run.sh [options]

  --config NAME            a conf of egs/CORPUS/conf/, or a TOML file (default: as the corpus says)
  --set SECTION.KEY=VALUE ...
                           override values of the conf
  --seed N                 (default: 42)
  --num-processes N        training processes (default: one per GPU; without GPU, 2 where there are 2 cores)
  --num-workers N          processes that load training data, for each training process (default: 1)
  --accum-grad N         parts in which a training process takes its share of a batch, one after the other: less memory
  --precision auto|bf16|fp16|fp32
                           of products in training (default: auto, by the device)
  --exp-dir DIR            for checkpoints and decoding (default: WORK_DIR/exp/CONFIG-seedN)
  --methods NAME ...       decoding methods (default: greedy_search ctc-decoding 1best for a system with CTC alone, all
                           for one with a transducer): ${known_methods[*]}
  --hlg-scales N ..., --ngram-lm-scales N ..., --blank-penalties N ...
                           weights to choose from on the dev set, of the language model for CTC and for a transducer, and
                           of a penalty on blanks; one of each: no choice, and faster
  --checkpoint FILE        decode with this one, of bin/average or bin/import_reference, instead of training; its tokens
                           are the bpe.model beside it, where there is one and no --bpe-model; implies --decode-only
  --init-from FILE         train from the weights of this checkpoint, of another corpus too; where its tokens are others, what
                           depends on them is new
  --freeze-encoder-layers N
                           train neither the front end nor the encoder's first N layers
  --word-list FILE         words of greedy_search+lexicon (default: those of the corpus's lexicon)
  --policy NAME            exit policy that is fitted to policy.json and decoded with (default: learned_nbest), one of:
                           ${known_policies[*]}
  --max-relative-wer X     errors that it may add, as a share of the last exit's (default: 0.05)
$corpus_usage
  --stage A, --stop-stage B
                           first and last stage, by number or name: those of prepare.sh (0 to 6), 7 train,
                           8 average, 9 decode, 10 early_exit, 11 report
END
}

# 0 to 6: prepare.sh, with the options given
run_prepare() {
    local name options=(--corpus "$corpus" --stage "$first_stage")
    ((last_stage < ${#prepare_stages[@]})) && options+=(--stop-stage "$last_stage")
    for name in "${corpus_options[@]}"; do
        if [[ $name != corpus && -v "given[$name]" ]]; then options+=("--${name//_/-}" "${given[$name]}"); fi
    done
    for name in "${corpus_flags[@]}"; do
        [[ ${!name} == false ]] || options+=("--${name//_/-}")
    done
    ./prepare.sh "${options[@]}"
}

# 7: training, unless a checkpoint is given
stage_train() {
    if [[ -n $checkpoint ]]; then
        log "nothing to train: the checkpoint is $checkpoint"
    else
        train_system
    fi
}

# What a run was started from is kept with it, because a run cannot go on from something else.
train_system() {
    local split train_cuts=() artefacts=() dev_cuts=() flags=() started_from=$exp_dir/.started-from
    local cuts tokens made_from noise name
    for split in "${train_list[@]}"; do
        train_cuts+=("$(train_cuts_of "$split")")
        artefacts+=("$(train_artefact_of "$split")")
    done
    for split in "${dev_list[@]}"; do dev_cuts+=("$(cuts_of "$split")"); done
    cuts=$(made_from "${artefacts[@]}" "${dev_cuts[@]}")
    tokens=$(made_from "$lang_dir/bpe.model")
    made_from=$(printf '%s\n' "seed $seed" "cuts $cuts" "tokens $tokens" ${initial:+"initial $initial"} \
        "$resolved_config")
    if [[ -n $musan_dir ]]; then
        noise=$(made_from "$(noise_cuts_of)")
        made_from+=$'\n'"noise $noise"
        flags+=(--noise-cuts "$(noise_cuts_of)")
    fi
    [[ $on_the_fly == false ]] || flags+=(--on-the-fly)
    for name in num_workers accum_grad precision; do
        [[ -z ${!name} ]] || flags+=("--${name//_/-}" "${!name}")
    done
    if [[ ! -f $started_from ]]; then
        mkdir -p "$exp_dir"
        printf '%s\n' "$made_from" >"$started_from.tmp"
        mv -f "$started_from.tmp" "$started_from"
    elif [[ $(<"$started_from") != "$made_from" ]]; then
        die "$exp_dir holds a run that was started from other data or another configuration (<: then, >: now):
$(diff "$started_from" - <<<"$made_from" | grep '^[<>]')
remove the folder to train anew, or give this run another --seed or --exp-dir"
    fi
    make_artefact "$exp_dir/training.jsonl" "$made_from" run_training \
        --config "$config_path" --exp-dir "$exp_dir" --train-cuts "${train_cuts[@]}" --dev-cuts "${dev_cuts[@]}" \
        --lang-dir "$lang_dir" --seed "$seed" --resume "${flags[@]}" "${initial_flags[@]}" \
        "${set_flags[@]}"
}

run_training() {
    local gpus processes=$num_processes
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus == 0)); then export OMP_NUM_THREADS=1; fi # one process per core is faster than one with many threads
    if [[ -z $processes ]]; then
        if ((gpus > 0)); then processes=$gpus; else processes=$(($(cores) >= 2 ? 2 : 1)); fi
    fi
    log "training in $processes processes, on $gpus GPUs"
    if ((processes == 1)); then
        run_python -m splitformer.bin.train "$@"
    else
        # as --standalone, but on a free port: that of torch 1.13 is always 29400, so two runs would meet
        run_python -m torch.distributed.run --nnodes 1 --nproc_per_node "$processes" \
            --rdzv_backend c10d --rdzv_endpoint localhost:0 -m splitformer.bin.train "$@"
    fi
}

# 8: the mean of the weights over the last epochs, or the checkpoint that is given
stage_average() {
    local training
    if [[ -n $checkpoint ]]; then
        training=$(checksum "$checkpoint")
        make_artefact "$exp_dir/averaged.pt" "$(printf '%s\n' "checkpoint $training" "$resolved_config")" \
            run_python local/use_checkpoint.py --checkpoint "$checkpoint" --config "$config_path" "${set_flags[@]}" \
            --output "$exp_dir/averaged.pt"
        return
    fi
    training=$(made_from "$exp_dir/training.jsonl")
    make_artefact "$exp_dir/averaged.pt" "training $training" \
        run_python -m splitformer.bin.average --exp-dir "$exp_dir"
}

# 9: every exit, every method; dev sets too, on which choices are made
stage_decode() {
    local split model sets graphs words='' choices cuts=() names=() choice_flags=()
    ((${#methods[@]} == 0)) || choice_flags+=(--methods "${methods[@]}")
    ((${#hlg_scales[@]} == 0)) || choice_flags+=(--hlg-scales "${hlg_scales[@]}")
    ((${#ngram_lm_scales[@]} == 0)) || choice_flags+=(--ngram-lm-scales "${ngram_lm_scales[@]}")
    ((${#blank_penalties[@]} == 0)) || choice_flags+=(--blank-penalties "${blank_penalties[@]}")
    if [[ -n $word_list ]]; then
        words=$(checksum "$word_list")
        choice_flags+=(--word-list "$word_list")
    fi
    for split in "${dev_list[@]}" "${test_list[@]}"; do
        contains "$split" "${names[@]}" && continue # one split may serve as both
        names+=("$split")
        cuts+=("$split=$(cuts_of "$split")")
    done
    model=$(made_from "$exp_dir/averaged.pt")
    sets=$(made_from "${cuts[@]#*=}")
    graphs=$(made_from "$lang_dir/HLG.pt" "$lang_dir/LG.pt" "$lang_dir/G.pt")
    choices="${choice_flags[*]}${words:+ words $words}"
    make_artefact "$exp_dir/decode" "model $model sets ${names[*]} $sets graphs $graphs choice_flags $choices" \
        run_decoding --cuts "${cuts[@]}" "${choice_flags[@]}"
}

run_decoding() {
    rm -rf "$exp_dir/decode" # records of another model must not stay among the new ones
    run_python -m splitformer.bin.decode --checkpoint "$exp_dir/averaged.pt" "$@" --lang-dir "$lang_dir" \
        --tune-set "${dev_list[0]}" --output-dir "$exp_dir/decode" --corpus "$corpus"
}

# 10: exit policies, fitted on the first dev set: WER against cost on the test sets, and a decoding with one of them
stage_early_exit() {
    local split tests=() model records sets
    if [[ $(config_value model.exit_layers) != *' '* ]]; then
        log "the model has one exit: there is nothing to choose"
        return
    fi
    for split in "${test_list[@]}"; do
        contains "$split" "${dev_list[@]}" || tests+=("$split=$(cuts_of "$split")")
    done
    if ((${#tests[@]} == 0)); then
        log "no test set but the dev sets: exit policies are fitted on these, and there is nothing to show them on"
        return
    fi
    model=$(made_from "$exp_dir/averaged.pt")
    records=$(made_from "$exp_dir/decode")
    sets=$(made_from "$(cuts_of "${dev_list[0]}")" "${tests[@]#*=}")
    [[ -f $exp_dir/policy.json ]] || rm -f "$exp_dir/early_exit/.done" # made by the same command
    make_artefact "$exp_dir/early_exit" "model $model records $records sets $sets policy $policy $max_relative_wer" \
        run_early_exit --test-cuts "${tests[@]}"
}

run_early_exit() {
    local calibration common
    calibration="${dev_list[0]}=$(cuts_of "${dev_list[0]}")"
    common=(--checkpoint "$exp_dir/averaged.pt" --lang-dir "$lang_dir")
    rm -rf "$exp_dir/early_exit"
    run_python -m splitformer.bin.tradeoff "${common[@]}" --cuts "$calibration" "$@" \
        --output-dir "$exp_dir/early_exit" --corpus "$corpus" ||
        die "no exit policies for these sets; --stage report makes the tables without"
    run_python -m splitformer.bin.calibrate "${common[@]}" --cuts "$calibration" "$@" \
        --policy "$policy" --max-relative-wer "$max_relative_wer" --output "$exp_dir/policy.json"
    shift # --test-cuts
    run_python -m splitformer.bin.decode "${common[@]}" --cuts "$@" --exit-policy "$exp_dir/policy.json" \
        --output-dir "$exp_dir/early_exit" --corpus "$corpus"
}

# 11: tables and plots of all runs
stage_report() {
    local published=egs/$corpus/published.toml each flags=() records inputs dev_only=()
    for each in "${dev_list[@]}"; do
        contains "$each" "${test_list[@]}" || dev_only+=("$each") # a corpus without test set reports its dev set
    done
    if [[ -f $published ]]; then flags=(--published "$published"); fi
    records=("$exp_root"/*/decode/*.json)
    for each in "$exp_root"/*/training.jsonl "$exp_root"/*/early_exit/*.json; do
        [[ ! -f $each ]] || records+=("$each")
    done
    inputs=$(checksum "${records[@]}" "${flags[@]:1}")
    make_artefact "$report_dir/RESULTS.md" "records $inputs" \
        run_python -m splitformer.bin.report --corpus "$corpus" --exp-root "$exp_root" \
        --results-dir "$report_dir/results" --output "$report_dir/RESULTS.md" --dev-sets "${dev_only[@]}" "${flags[@]}"
}

# config_value SECTION.KEY: of the resolved configuration
config_value() {
    run_python local/show_config.py --config "$config_path" "${set_flags[@]}" --print "$1"
}

# The configuration says what features are; --fbank says what computes them, where there is a choice.
choose_features() {
    local features
    features=$(config_value data.features)
    if [[ $features == linear-mel && ! -v "given[fbank]" ]]; then
        given[fbank]=linear-mel
        fbank=linear-mel
    fi
    if [[ $features == linear-mel && $fbank != linear-mel || $features == fbank && $fbank == linear-mel ]]; then
        option_error "--fbank $fbank does not compute the features of this configuration, whose data.features is\
 $features; leave --fbank out, or give a conf or --set data.features=... that fits"
    fi
    place_features
}

# The configuration says how often noise is mixed in, --musan-dir where it is.
check_noise() {
    local p
    p=$(config_value augment.noise_p)
    if [[ -n $checkpoint ]] || ((first_stage > 7 || last_stage < 7)); then return; fi # nothing is trained
    if [[ $p != 0.0 && -z $musan_dir ]]; then
        option_error "this configuration's augment.noise_p is $p, and there is no noise: give --musan-dir DIR, a folder\
 with MUSAN's folders music, noise and speech, or --set augment.noise_p=0"
    fi
    if [[ $p == 0.0 && -n $musan_dir ]]; then
        option_error "--musan-dir is given, and this configuration's augment.noise_p is 0, which mixes nothing in: give\
 --set augment.noise_p=0.5, for instance, or leave --musan-dir out"
    fi
}

# Read to its end before it runs: bash would go on in the middle of a file that is replaced meanwhile.
main() {
    parse_options "$@"
    select_stages "${prepare_stages[@]}" train average decode early_exit report
    if [[ -n $checkpoint ]]; then
        checkpoint=$(absolute_path "$checkpoint")
        [[ -f $checkpoint ]] || option_error "--checkpoint: there is no $checkpoint"
        decode_only=true
        each=$(dirname "$checkpoint")/bpe.model
        if [[ -z $bpe_model && -f $each ]]; then bpe_model=$each; fi
    elif [[ $decode_only == true ]]; then
        option_error "--decode-only makes no features to train on: give a --checkpoint, or prepare with ./prepare.sh"
    fi
    initial='' initial_flags=()
    if [[ -n $init_from ]]; then
        init_from=$(absolute_path "$init_from")
        [[ -f $init_from ]] || option_error "--init-from: there is no $init_from"
        [[ -z $checkpoint ]] || option_error "--checkpoint decodes without training, --init-from trains: give one of them"
        initial=init-$(checksum "$init_from" | cut -c 1-8)
        initial_flags=(--init-from "$init_from")
    fi
    check_number freeze_encoder_layers empty
    if [[ -n $freeze_encoder_layers ]]; then
        initial+=${initial:+-}freeze-$freeze_encoder_layers
        initial_flags+=(--freeze-encoder-layers "$freeze_encoder_layers")
    fi
    if [[ -n $word_list ]]; then
        word_list=$(absolute_path "$word_list")
        [[ -f $word_list ]] || option_error "--word-list: there is no $word_list"
    fi
    load_corpus
    check_number seed
    for each in num_processes num_workers accumulation; do check_number "$each" empty; done
    [[ -z $precision ]] || check_choice precision auto bf16 fp16 fp32
    check_choice policy "${known_policies[@]}"
    [[ $max_relative_wer =~ ^[0-9]*\.?[0-9]+$ ]] ||
        option_error "--max-relative-wer is '$max_relative_wer' and must be a number such as 0.05"
    for each in "${methods[@]}"; do
        contains "$each" "${known_methods[@]}" || option_error "unknown method '$each'; methods are: ${known_methods[*]}"
    done

    # The configuration, and where its run lies.
    config=${config:-$default_config}
    if [[ $config == *.toml ]]; then
        config_path=$(absolute_path "$config")
        config=$(basename "$config" .toml)
    else
        config_path=egs/$corpus/conf/$config.toml
    fi
    if [[ ! -f $config_path ]]; then
        choices=''
        for each in "egs/$corpus/conf"/*.toml; do choices+=" $(basename "$each" .toml)"; done
        option_error "unknown config '$config'; egs/$corpus/conf has:$choices"
    fi
    set_flags=()
    system=$config
    for each in "${set[@]}"; do
        set_flags+=(--set "$each")
        system+=+${each//[^A-Za-z0-9._=-]/_}
    done
    system+=${initial:++$initial}
    ((${#system} <= 100)) || system=$config+$(printf '%s\n' "${set[@]}" ${initial:+"$initial"} | sha256sum | cut -c 1-8)
    variant=${subset_tag#_}${limit_utterances:+limit-$limit_utterances} # not the corpus as it is published
    exp_root=$work_dir/exp${variant:+/$variant}
    report_dir=$work_dir
    [[ -z $variant ]] || report_dir=$exp_root
    if [[ -n $exp_dir ]]; then
        exp_dir=$(absolute_path "$exp_dir")
        exp_root=$(dirname "$exp_dir")
    else
        exp_dir=$exp_root/$system
        [[ -n $checkpoint ]] || exp_dir+=-seed$seed # nothing is drawn where nothing is trained
    fi

    # Another environment, where one is named, is not ours to set up.
    [[ -n ${SPLITFORMER_PYTHON:-} ]] || ./setup.sh

    # Checked before hours of work: an unknown key in the configuration is fatal.
    resolved_config=$(run_python local/show_config.py --config "$config_path" "${set_flags[@]}")

    choose_features
    check_noise
    if [[ -n $checkpoint && ${#methods[@]} -eq 0 && $(config_value model.heads) == ctc ]]; then
        methods=(greedy_search greedy_search+lexicon ctc-decoding 1best) # as published, perhaps, and beside it ours
    fi

    if ((first_stage < ${#prepare_stages[@]})); then run_prepare; fi
    for name in train average decode early_exit report; do run_stage "$name"; done
    ((last_stage < 11)) || log "results are in $report_dir/RESULTS.md"
}

main "$@"
exit
