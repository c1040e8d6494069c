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

# Between the commands of stages, signals end the driver too where it is process 1 of a container, which ignores them by default.
stop_on_signals() {
    trap 'exit 143' TERM HUP QUIT
    trap 'exit 138' USR1
    trap 'exit 130' INT
}
stop_on_signals

# supervise COMMAND...: runs a command in a session of its own, which the signals of the terminal do not reach, and returns
# its status. SIGTERM, Slurm's SIGUSR1, Ctrl-C and a closed terminal end the command by SIGTERM, and the driver exits when it
# has ended: training saves its state first. A second Ctrl-C kills it.
supervise() {
    local status=0 group='' signal=''
    trap 'signal=TERM; send TERM "$group"' TERM HUP QUIT
    trap 'signal=USR1; send TERM "$group"' USR1
    trap 'if [[ $signal == INT ]]; then send KILL "$group"; else signal=INT; send TERM "$group"; fi' INT
    setsid -- "$@" &
    group=$!
    [[ -z $signal ]] || send TERM "$group" # a signal before the group was known
    while :; do # a signal ends `wait`, not the command
        status=0
        wait "$group" || status=$?
        kill -0 "$group" 2>/dev/null || break
    done
    stop_on_signals
    [[ -z $signal ]] || send TERM "$group" # children that the command left behind
    case $signal in
        TERM) log "stopped by SIGTERM; the same command resumes"; exit 143 ;;
        USR1) log "stopped by SIGUSR1; the same command resumes"; exit 138 ;;
        INT) log "stopped by Ctrl-C; the same command resumes"; exit 130 ;;
    esac
    return "$status"
}

# send SIGNAL PID: signals a process group; just after the start, before setsid has made it, the process
send() {
    [[ -n $2 ]] || return 0
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
    local path=$1 fingerprint=$2 folder
    shift 2
    if ! is_made "$path" "$fingerprint"; then
        for folder in "${locked_folders[@]}"; do
            if [[ $path == "$folder"/* ]]; then lock_folder exclusive "$folder"; fi
        done
    fi
    if is_made "$path" "$fingerprint"; then # asked again: another process may have made it before the lock
        log "$path exists already"
        return
    fi
    [[ ! -f $(done_file "$path") ]] || log "$path was made from other inputs; rebuilding it"
    rm -f "$(done_file "$path")"
    mkdir -p "$(dirname "$path")"
    "$@"
    [[ -e $path ]] || die "$1 succeeded, but $path does not exist"
    write_line "$(done_file "$path")" "$fingerprint"
}

# is_made PATH FINGERPRINT
is_made() {
    local done_file
    done_file=$(done_file "$1")
    [[ -e $1 && -f $done_file && $(<"$done_file") == "$2" ]]
}

# write_line FILE TEXT: the file appears when it is complete
write_line() {
    local temporary=$1.$HOSTNAME.$$.tmp
    printf '%s\n' "$2" >"$temporary"
    mv -f "$temporary" "$1"
}

# Folders that make_artefact locks before it changes something in them.
locked_folders=()
declare -A lock_of=() lock_kind=()

# lock_folder exclusive|shared FOLDER: exclusive to change the folder, shared to read it. The lock is the kernel's: it ends
# with this driver and what it has started, however they end.
lock_folder() {
    local kind=$1 folder=$2 file=$2/.driver-lock lock
    [[ ${lock_kind[$folder]:-} != exclusive && ${lock_kind[$folder]:-} != "$kind" ]] || return 0
    if [[ ! -v "lock_of[$folder]" ]]; then
        if [[ $kind == shared && ! -w $folder ]]; then return; fi # a read-only folder cannot change
        mkdir -p "$folder"
        exec {lock}<>"$file"
        lock_of[$folder]=$lock
    fi
    lock=${lock_of[$folder]}
    if ! flock --nonblock "--$kind" "$lock"; then
        die "$folder is in use by $(holder_of "$file" "$lock"); wait until that has ended, or choose other folders" \
            "(--work-dir, --exp-dir)"
    fi
    lock_kind[$folder]=$kind
    if [[ $kind == exclusive ]]; then
        printf '%s, process %s on host %s, since %(%F %T)T\n' "${0##*/}" "$$" "$HOSTNAME" -1 >"$file"
    fi
}

# holder_of LOCK_FILE DESCRIPTOR: who holds the lock: the text of the file, or, of those who read the folder, their processes
holder_of() {
    local each pid readers=''
    if ! flock --nonblock --shared "$2"; then
        cat "$1"
        return
    fi
    for each in /proc/[0-9]*/fd/*; do
        pid=${each#/proc/} pid=${pid%%/*}
        if [[ $each -ef $1 && $pid != "$$" && $pid != "$BASHPID" && $readers != *" $pid"* ]]; then readers+=" $pid"; fi
    done
    echo "runs that read it${readers:+ (on this host, process$readers)}"
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
