# shellcheck shell=bash disable=SC2154  # the options are parse_options.sh's
# Bookkeeping of the drivers: which stages run, what is made already, and how progress is told.
#
# An artefact is made once. Beside it lies a file (`.NAME.done`, in a folder `.done`) that holds what it was made
# from: options and checksums of inputs. It is written last, after the artefact was moved into place. Where it says
# the same again, nothing is done; where it says otherwise, the artefact is made again.

# In a log file, where a progress bar cannot be redrawn, once in a while is enough.
[[ -t 2 ]] || export TQDM_MININTERVAL=${TQDM_MININTERVAL:-20}

# nproc counts no more than OMP_NUM_THREADS, which is about threads of one process
cores() { env -u OMP_NUM_THREADS nproc; }

log() {
    printf '%(%H:%M:%S)T %s: %s\n' -1 "${0##*/}" "$*"
}

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# select_stages NAME...: the names of all stages, in order; reads stage and stop_stage (numbers or names)
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

# run_stage NAME: calls the function stage_NAME where the stage is among the selected ones.
# Not `run_stage || ...`: bash would go on after errors inside.
run_stage() {
    local number
    number=$(stage_number run_stage "$1")
    if ((number >= first_stage && number <= last_stage)); then
        log "stage $number: $1"
        "stage_$1"
    fi
}

# make_artefact PATH MADE_FROM COMMAND...: runs the command, which makes PATH, unless PATH is made from just that
make_artefact() {
    local path=$1 made_from=$2 done_file
    shift 2
    done_file=$(done_file "$path")
    if [[ -e $path && -f $done_file ]]; then
        if [[ $(<"$done_file") == "$made_from" ]]; then
            log "$path is made already"
            return
        fi
        log "$path was made from something else; making it again"
    fi
    rm -f "$done_file"
    mkdir -p "$(dirname "$path")"
    "$@"
    [[ -e $path ]] || die "$1 ended without an error, but $path is not there"
    done_file=$(done_file "$path")
    printf '%s\n' "$made_from" >"$done_file.tmp"
    mv -f "$done_file.tmp" "$done_file"
}

done_file() {
    if [[ -d $1 ]]; then echo "$1/.done"; else echo "$(dirname "$1")/.$(basename "$1").done"; fi
}

# checksum FILE...: of the contents, in this order; a missing file is fatal
checksum() {
    local file
    for file in "$@"; do
        [[ -f $file ]] || die "there is no $file; an earlier stage makes it"
    done
    cat -- "$@" | sha256sum | cut -c 1-16
}

# made_from PATH...: what these artefacts were made from, in short; artefacts that were not made are fatal
made_from() {
    local path files=()
    for path in "$@"; do
        files+=("$(done_file "$path")")
    done
    checksum "${files[@]}"
}
