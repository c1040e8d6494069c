# shellcheck shell=bash disable=SC2154  # the drivers set the lists of options
# Reads a driver's command line. The driver sets, before it calls `parse_options "$@"`:
#
#   value_options=(corpus num_jobs)    --num-jobs 4 sets the variable num_jobs
#   flag_options=(strict)              --strict sets strict=true
#   list_options=(methods)             --methods a b c sets the array methods; given again, it adds to it
#   usage() { ... }                    prints what --help shows
#
# Variables keep the values they had where their option is absent. What was given is kept in `given`, so that
# `reapply_options` can put it above values that a corpus.sh, read later, has set.

declare -A given=()

option_error() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# contains WORD LIST...
contains() {
    local wanted=$1 each
    shift
    for each in "$@"; do [[ $each == "$wanted" ]] && return 0; done
    return 1
}

parse_options() {
    local argument name all value
    all=("${value_options[@]}" "${flag_options[@]}" "${list_options[@]}")
    while (($#)); do
        argument=$1
        shift
        if [[ $argument == --help || $argument == -h ]]; then
            usage
            exit 0
        fi
        [[ $argument == --?* ]] || option_error "unexpected argument '$argument'; options begin with --, see --help"
        name=${argument#--}
        if [[ $name == *=* ]]; then # --name=value is --name value
            set -- "${name#*=}" "$@"
            name=${name%%=*}
            contains "${name//-/_}" "${flag_options[@]}" && option_error "--$name takes no value"
        fi
        name=${name//-/_}
        contains "$name" "${all[@]}" ||
            option_error "unknown option '$argument'; options are: $(printf -- '--%s ' "${all[@]//_/-}")"
        if contains "$name" "${flag_options[@]}"; then
            given[$name]=true
            printf -v "$name" true
        elif contains "$name" "${value_options[@]}"; then
            (($#)) || option_error "$argument needs a value"
            value=$1
            shift
            [[ $value != --* ]] || option_error "$argument needs a value, and '$value' is an option"
            given[$name]=$value
            printf -v "$name" %s "$value"
        else
            (($#)) && [[ $1 != --* ]] || option_error "$argument needs one or more values"
            local -n list=$name
            [[ -v "given[$name]" ]] || list=()
            given[$name]=list
            while (($#)) && [[ $1 != --* ]]; do
                list+=("$1")
                shift
            done
            unset -n list
        fi
    done
}

reapply_options() {
    local name
    for name in "${!given[@]}"; do
        if ! contains "$name" "${list_options[@]}"; then printf -v "$name" %s "${given[$name]}"; fi
    done
}

# check_choice NAME CHOICES...: the value of the variable NAME is one of the choices
check_choice() {
    local name=$1
    shift
    contains "${!name}" "$@" || option_error "--${name//_/-} is '${!name}'; choose one of: $*"
}

# check_number NAME [empty]: the value is a whole number above zero; `empty` allows an empty one
check_number() {
    [[ -z ${!1} && ${2:-} == empty ]] && return
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || option_error "--${1//_/-} is '${!1}'; it takes a whole number from 1 up"
}
