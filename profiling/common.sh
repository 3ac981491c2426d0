# shellcheck shell=bash
# shellcheck disable=SC2154 # here: this folder, which the scripts set
# What nsys.sh, ncu.sh and sanitize.sh share: the interpreter, what must be there, and running or printing a command.

if [[ ${1-} == --help || ${1-} == -h ]]; then # the comment at the top of the script
  while IFS= read -r line && [[ $line == '#'* ]]; do
    [[ $line == '#!'* ]] || printf '%s\n' "${line:2}"
  done <"$0"
  exit 0
fi

print=no
python=python
if [[ -x $here/../.venv/bin/python ]]; then python=$here/../.venv/bin/python; fi
python=${PYTHON:-$python}

missing() { # what is missing, and what to run in its place
  printf '%s\n' "$@" >&2
  exit 3
}

need_number() { # OPTION VALUE: a whole number, at least 0
  [[ $2 =~ ^[0-9]+$ ]] || { echo "$1 needs a number, got $2" >&2; exit 2; }
}

need_tool() { # TOOL PACKAGE INSTEAD: a tool, what it comes with, and what to run where it is not
  command -v "$1" >/dev/null || missing "$1 is not installed, or not in PATH: it comes with $2." "Instead: $3"
}

need_gpu() { # INSTEAD
  command -v "$python" >/dev/null || missing "$python is not there: PYTHON names the interpreter that has ipr_fast."
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    missing "there is no CUDA device that the torch of $python can use." "Instead: $1"
}

run() { # a command, or print the line that would run it
  if [[ $print == no ]]; then
    "$@"
    return
  fi
  local word
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_=:,./@+-]+$ ]] || word=\'$word\'
    printf '%s ' "$word"
  done
  printf '\n'
}
