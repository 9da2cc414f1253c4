// Counts of what the host asked of the device; python/sitecustomize.py reads them.
#include "standin.h"

static long counts[N_COUNTS];
static const char *const names[N_COUNTS] = {
    [STREAM_SYNCS] = "stream syncs",
    [EVENT_SYNCS] = "event syncs",
    [DEVICE_SYNCS] = "device syncs",
    [COPIES_TO_HOST] = "copies to the host",
    [COPIES_TO_DEVICE] = "copies to the device",
    [COPIES_ON_DEVICE] = "copies on the device",
    [UNPINNED_COPIES] = "copies of unpinned memory",
    [ATEN_LAUNCHES] = "ATen launches",
    [TRITON_LAUNCHES] = "Triton launches",
    [MEMSETS] = "memsets",
    [GEMMS] = "GEMMs",
    [GRAPH_LAUNCHES] = "graph launches",
    [KERNELS_IN_GRAPHS] = "kernels in graphs",
    [ALLOCATIONS] = "allocations",
    [MODULES] = "modules loaded",
};

void note(enum count what, long times) {
  __atomic_fetch_add(&counts[what], times, __ATOMIC_RELAXED);
}

// The name of count number i and its value so far; NULL after the last.
const char *fakegpu_count(int i, long *value) {
  if (i >= N_COUNTS) return NULL;
  *value = __atomic_load_n(&counts[i], __ATOMIC_RELAXED);
  return names[i];
}
