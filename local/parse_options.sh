# shellcheck shell=bash disable=SC2154  # the drivers set the lists of options
# Reads a driver's command line. Before it calls `parse_options "$@"`, the driver sets
#
#   value_options=(corpus num_jobs)    --num-jobs 4 sets the variable num_jobs
#   flag_options=(strict)              --strict sets strict=true
#   list_options=(methods)             --methods a b c sets the array methods; given again, it adds to it
#   usage() { ... }                    prints what --help shows
#
# Variables of options that are not given keep their values. The options that are given are kept in `given`, so that
# `reapply_options` can override values that a corpus.sh sets later.

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

# did_you_mean WORD LIST...: " Did you mean X?" if a word of the list is similar; needs python3, and is silent without
did_you_mean() {
    python3 -c 'import difflib, sys
near = difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1)
print(f" Did you mean {near[0]}?" if near else "", end="")' "$@" 2>/dev/null || :
}

# Locals begin with an underscore: an option of the same name would be set here, not in the driver.
parse_options() {
    local _argument _name _all _options _value
    _all=("${value_options[@]}" "${flag_options[@]}" "${list_options[@]}")
    _options=("${_all[@]//_/-}")
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
            option_error "unknown option '$_argument'.$(did_you_mean "--${_name//_/-}" "${_options[@]/#/--}")" \
                "--help lists the options"
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

# check_decimals NAME: every value is a decimal number, 0 or more
check_decimals() {
    local -n _values=$1
    local _each
    for _each in "${_values[@]}"; do
        [[ $_each =~ ^[0-9]*\.?[0-9]+$ ]] || option_error "--${1//_/-} is '$_each'; it takes numbers such as 0.5"
    done
}

# check_number NAME [empty] [zero]: the value is a positive integer; `empty` allows no value, `zero` allows 0
check_number() {
    local name=$1 pattern='^[1-9][0-9]*$' range="an integer from 1 up"
    shift
    [[ -z ${!name} ]] && contains empty "$@" && return
    if contains zero "$@"; then pattern='^[0-9]+$' range="an integer from 0 up"; fi
    [[ ${!name} =~ $pattern ]] || option_error "--${name//_/-} is '${!name}'; it takes $range"
}
