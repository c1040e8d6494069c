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

# Locals begin with an underscore: an option of the same name would be set here, not in the driver.
parse_options() {
    local _argument _name _all _value
    _all=("${value_options[@]}" "${flag_options[@]}" "${list_options[@]}")
    while (($#)); do
        _argument=$1
        shift
        if [[ $_argument == --help || $_argument == -h ]]; then
            usage
            exit 0
        fi
        [[ $_argument == --?* ]] || option_error "unexpected argument '$_argument'; options begin with --, see --help"
        _name=${_argument#--}
        if [[ $_name == *=* ]]; then # --name=value is --name value
            set -- "${_name#*=}" "$@"
            _name=${_name%%=*}
            contains "${_name//-/_}" "${flag_options[@]}" && option_error "--$_name takes no value"
        fi
        _name=${_name//-/_}
        contains "$_name" "${_all[@]}" ||
            option_error "unknown option '$_argument'; options are: $(printf -- '--%s ' "${_all[@]//_/-}")"
        if contains "$_name" "${flag_options[@]}"; then
            given[$_name]=true
            printf -v "$_name" true
        elif contains "$_name" "${value_options[@]}"; then
            (($#)) || option_error "$_argument needs a value"
            _value=$1
            shift
            [[ $_value != --* ]] || option_error "$_argument needs a value, and '$_value' is an option"
            given[$_name]=$_value
            printf -v "$_name" %s "$_value"
        else
            (($#)) && [[ $1 != --* ]] || option_error "$_argument needs one or more values"
            local -n _list=$_name
            [[ -v "given[$_name]" ]] || _list=()
            given[$_name]=list
            while (($#)) && [[ $1 != --* ]]; do
                _list+=("$1")
                shift
            done
            unset -n _list
        fi
    done
}

reapply_options() {
    local _name
    for _name in "${!given[@]}"; do
        if ! contains "$_name" "${list_options[@]}"; then printf -v "$_name" %s "${given[$_name]}"; fi
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
