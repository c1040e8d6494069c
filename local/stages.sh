# shellcheck shell=bash disable=SC2154  # parse_options.sh sets the options
# Selects and runs stages, skips finished artefacts, and logs progress.
#
# An artefact is made once. Beside it is a file (`.NAME.done`, or `.done` inside a folder) with the fingerprint of what it
# was made from: options and checksums of inputs. The file is written last, after the artefact was moved into place. If the
# fingerprint is the same in the next run, nothing is done; if it differs, the artefact is rebuilt.

# A log file cannot redraw a progress bar: print one line every 20 seconds.
[[ -t 2 ]] || export TQDM_MININTERVAL=${TQDM_MININTERVAL:-20}

# nproc counts at most OMP_NUM_THREADS, which is the number of threads of one process
cores() { env -u OMP_NUM_THREADS nproc; }

log() {
    printf '%(%H:%M:%S)T %s: %s\n' -1 "${0##*/}" "$*"
}

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# supervise COMMAND...: runs a command in a session of its own, which the signals of the terminal do not reach, and returns
# its status. SIGTERM, Ctrl-C and a closed terminal end the command by SIGTERM, and the driver exits when it has ended:
# training saves its state first. A second Ctrl-C kills it.
supervise() {
    local status=0 group signal=''
    setsid -- "$@" &
    group=$!
    trap 'signal=TERM; send TERM "$group"' TERM HUP QUIT
    trap 'if [[ $signal == INT ]]; then send KILL "$group"; else signal=INT; send TERM "$group"; fi' INT
    while :; do # a signal ends `wait`, not the command
        status=0
        wait "$group" || status=$?
        kill -0 "$group" 2>/dev/null || break
    done
    trap - TERM HUP QUIT INT
    [[ -z $signal ]] || send TERM "$group" # children that the command left behind
    case $signal in
        TERM) log "stopped by SIGTERM; the same command resumes"; exit 143 ;;
        INT) log "stopped by Ctrl-C; the same command resumes"; exit 130 ;;
    esac
    return "$status"
}

# send SIGNAL PID: signals a process group; just after the start, before setsid has made it, the process
send() {
    kill "-$1" -- "-$2" 2>/dev/null || kill "-$1" "$2" 2>/dev/null || :
}

# select_stages NAME...: the names of all stages, in order; reads the options stage and stop_stage (numbers or names)
select_stages() {
    stage_names=("$@")
    first_stage=$(stage_number --stage "$stage") || exit
    last_stage=$(stage_number --stop-stage "$stop_stage") || exit
    ((first_stage <= last_stage)) || option_error "--stage $stage comes after --stop-stage $stop_stage"
}

stage_number() {
    local i choices=''
    for i in "${!stage_names[@]}"; do
        if [[ $2 == "$i" || $2 == "${stage_names[i]}" ]]; then
            echo "$i"
            return
        fi
        choices+="$i ${stage_names[i]}, "
    done
    option_error "unknown stage '$2' for $1; stages are: ${choices%, }"
}

# run_stage NAME: calls the function stage_NAME if the stage is selected.
# Not `run_stage || ...`: bash would continue after errors inside.
run_stage() {
    local number
    number=$(stage_number run_stage "$1")
    if ((number >= first_stage && number <= last_stage)); then
        log "stage $number: $1"
        "stage_$1"
    fi
}

# make_artefact PATH FINGERPRINT COMMAND...: runs the command, which makes PATH, unless PATH has this fingerprint
make_artefact() {
    local path=$1 fingerprint=$2 done_file
    shift 2
    done_file=$(done_file "$path")
    if [[ -e $path && -f $done_file ]]; then
        if [[ $(<"$done_file") == "$fingerprint" ]]; then
            log "$path exists already"
            return
        fi
        log "$path was made from other inputs; rebuilding it"
    fi
    rm -f "$done_file"
    mkdir -p "$(dirname "$path")"
    "$@"
    [[ -e $path ]] || die "$1 succeeded, but $path does not exist"
    done_file=$(done_file "$path")
    printf '%s\n' "$fingerprint" >"$done_file.tmp"
    mv -f "$done_file.tmp" "$done_file"
}

done_file() {
    if [[ -d $1 ]]; then echo "$1/.done"; else echo "$(dirname "$1")/.$(basename "$1").done"; fi
}

# checksum FILE...: of the contents, in this order; a missing file is fatal
checksum() {
    local file
    for file in "$@"; do
        [[ -f $file ]] || die "there is no $file; $(stage_of "$file") makes it"
    done
    cat -- "$@" | sha256sum | cut -c 1-16
}

# fingerprint_of PATH...: a checksum of these artefacts' fingerprints; a missing artefact is fatal
fingerprint_of() {
    local path files=()
    for path in "$@"; do
        files+=("$(done_file "$path")")
        [[ -f ${files[-1]} ]] || die "there is no finished $path; $(stage_of "$path") makes it"
    done
    checksum "${files[@]}"
}

# stage_of PATH: which stage makes this artefact
stage_of() {
    local name
    case ${1##*/} in
        *_recordings.jsonl.gz | *_supervisions.jsonl.gz) name=manifests ;;
        *_cuts.jsonl.gz | *_shar_*) name=fbank ;;
        train.txt | extra_words.txt | bpe.model | tokens.txt) name=bpe ;;
        L_disambig.pt | words.txt) name=lang ;;
        *.arpa) name=lm ;;
        HLG.pt | LG.pt | G.pt) name=graphs ;;
        training.jsonl) name=train ;;
        averaged.pt) name=average ;;
        decode) name=decode ;;
        *) echo "an earlier stage"; return ;;
    esac
    echo "stage '$name'"
}
