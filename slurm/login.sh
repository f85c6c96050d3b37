# Sourced by the scripts that run on the login node: the site's settings and the virtual environment.
project=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
here=$PWD
cd "$project" || exit
[[ ! -f slurm/site.env ]] || source slurm/site.env
set -euo pipefail # after site.env: `module` does not bear it everywhere
source ./set_up.sh
cd "$here" # paths on the command line count from there
export PYTHONPATH=$project
