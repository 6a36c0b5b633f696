#!/bin/bash
# Runs an MPI program on several "hosts" of one machine: network namespaces with a name, an address and a virtual cable
# each, on a virtual switch. Needs root, iproute2 and the mpiexec of MPICH (on PATH, or $MPIEXEC).
#
#     tools/hosts.sh 2 4 python script.py              # 2 hosts, 4 ranks in turn on them
#     DELAY_S=0.001 tools/hosts.sh 2 2 python script.py  # each message takes 1 ms longer
#
# Nothing outside can be reached from these hosts, and nothing of this machine's own network is changed. Exit code 77
# where such hosts cannot be made.
set -eu

if [ -n "${HOSTS_PREFIX:-}" ]; then
    # As Hydra calls it in place of ssh: [options] address command...
    while [[ "$1" == -* ]]; do shift; done
    number=${1##*.}
    shift
    exec ip netns exec "$HOSTS_PREFIX$number" unshare --uts bash -c "hostname host$number; exec $*"
fi

hosts=$1 ranks=$2
shift 2
cannot() { echo "hosts.sh: $1" >&2; exit 77; }
[ "$(id -u)" = 0 ] || cannot "network namespaces need root"
command -v ip >/dev/null || cannot "no ip command (apt-get install iproute2)"
mpiexec=$(command -v "${MPIEXEC:-mpiexec}") || cannot "no mpiexec"
export HOSTS_PREFIX=bridge$$-
switch=${HOSTS_PREFIX}switch
# Else MPI finds out that the hosts share their memory, and leaves out the network.
export UCX_TLS=tcp,self FI_PROVIDER=tcp

trap 'for name in "$switch" $(seq -f "$HOSTS_PREFIX%g" 1 "$hosts"); do ip netns del "$name" 2>/dev/null; done' EXIT
ip netns add "$switch" 2>/dev/null || cannot "no network namespaces here"
if [ -n "${DELAY_S:-}" ]; then
    # The relay ends when this script does, which closes its standard input.
    coproc ip netns exec "$switch" python3 "$(dirname "$0")/delay_line.py" "$hosts" "$DELAY_S"
    read -r _ <&"${COPROC[0]}" || cannot "no TAP interfaces here"
else
    ip -n "$switch" link add name switch type bridge 2>/dev/null || cannot "no virtual switch here"
    ip -n "$switch" link set switch up
fi
addresses=
for ((i = 1; i <= hosts; i++)); do
    name=$HOSTS_PREFIX$i
    ip netns add "$name"
    ip -n "$name" link set lo up
    if [ -n "${DELAY_S:-}" ]; then
        ip -n "$switch" link set "port$i" netns "$name"
        ip -n "$name" link set "port$i" name eth0 mtu 60000
    else
        ip -n "$name" link add eth0 type veth peer name "port$i" netns "$switch"
        ip -n "$switch" link set "port$i" master switch up
    fi
    ip -n "$name" addr add "10.77.0.$i/24" dev eth0
    ip -n "$name" link set eth0 up
    addresses+=,10.77.0.$i
done

# The launcher is on the first host, and reaches the others by this script.
ip netns exec "${HOSTS_PREFIX}1" unshare --uts bash -c 'hostname host1; exec "$@"' _ \
    "$mpiexec" -launcher ssh -launcher-exec "$(realpath "$0")" -iface eth0 -hosts "${addresses#,}" -ppn 1 -n "$ranks" "$@"
