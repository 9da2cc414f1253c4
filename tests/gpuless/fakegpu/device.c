// The properties of the device: one of the three below, chosen by the variable FAKEGPU_DEVICE that
// the launcher sets. Figures are from NVIDIA's data sheets and tuning guides.
#include "standin.h"

static const struct device devices[] = {
    {.key = "h100",
     .name = "NVIDIA H100 80GB HBM3",
     .major = 9,
     .minor = 0,
     .multiprocessors = 132,
     .threads_per_multiprocessor = 2048,
     .blocks_per_multiprocessor = 32,
     .shared_per_block_optin = 227 << 10,
     .shared_per_multiprocessor = 228 << 10,
     .l2_bytes = 50 << 20,
     .bus_bits = 5120,
     .clock_khz = 1980000,
     .memory_clock_khz = 2619000,
     .memory_bytes = (size_t)79 << 30},
    {.key = "a100",
     .name = "NVIDIA A100-SXM4-80GB",
     .major = 8,
     .minor = 0,
     .multiprocessors = 108,
     .threads_per_multiprocessor = 2048,
     .blocks_per_multiprocessor = 32,
     .shared_per_block_optin = 163 << 10,
     .shared_per_multiprocessor = 164 << 10,
     .l2_bytes = 40 << 20,
     .bus_bits = 5120,
     .clock_khz = 1410000,
     .memory_clock_khz = 1593000,
     .memory_bytes = (size_t)79 << 30},
    {.key = "t4",
     .name = "Tesla T4",
     .major = 7,
     .minor = 5,
     .multiprocessors = 40,
     .threads_per_multiprocessor = 1024,
     .blocks_per_multiprocessor = 16,
     .shared_per_block_optin = 64 << 10,
     .shared_per_multiprocessor = 64 << 10,
     .l2_bytes = 4 << 20,
     .bus_bits = 256,
     .clock_khz = 1590000,
     .memory_clock_khz = 5001000,
     .memory_bytes = (size_t)14910 << 20},
};

const struct device *standin(void) {
  const char *wanted = getenv("FAKEGPU_DEVICE");
  for (size_t i = 0; wanted && i < sizeof devices / sizeof *devices; i++)
    if (!strcmp(devices[i].key, wanted)) return &devices[i];
  return &devices[0];
}

// cudaDeviceAttr and CUdevice_attribute have the same numbers.
static int attribute(int which) {
  const struct device *d = standin();
  switch (which) {
    case 1:
    case 2:
    case 3: return 1024;        // threads of a block; block size x, y
    case 4: return 64;          // block size z
    case 5: return 2147483647;  // grid size x
    case 6:
    case 7: return 65535;     // grid size y, z
    case 8: return 48 << 10;  // shared memory of a block
    case 10: return 32;       // warp size
    case 12:
    case 82: return 65536;  // registers of a block, of a multiprocessor
    case 13: return d->clock_khz;
    case 16: return d->multiprocessors;
    case 36: return d->memory_clock_khz;
    case 37: return d->bus_bits;
    case 38: return d->l2_bytes;
    case 39: return d->threads_per_multiprocessor;
    case 41:
    case 83:
    case 95:
    case 115: return 1;  // unified addresses, managed, cooperative, pools
    case 75: return d->major;
    case 76: return d->minor;
    case 81: return d->shared_per_multiprocessor;
    case 97: return d->shared_per_block_optin;
    case 106: return d->blocks_per_multiprocessor;
    default: return 0;
  }
}

// cudaDeviceProp in CUDA 13's layout, 1,008 bytes.
struct properties {
  char name[256];
  unsigned char uuid[16];
  char luid[12];
  size_t total_memory, shared_per_block;
  int registers_per_block, warp_size;
  size_t pitch;
  int threads_per_block, block_size[3], grid_size[3];
  size_t constant_memory;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int multiprocessors, integrated, maps_host_memory;
  int textures_and_surfaces[39];
  size_t surface_alignment;
  int concurrent_kernels, ecc, pci_bus, pci_device, pci_domain, tcc, copy_engines,
      unified_addresses;
  int bus_bits, l2_bytes, persisting_l2_bytes, threads_per_multiprocessor;
  int stream_priorities, global_l1, local_l1;
  size_t shared_per_multiprocessor;
  int registers_per_multiprocessor, managed, multi_gpu_board, board_group, native_atomics, pageable;
  int concurrent_managed, preemption, registered_host_pointers, cooperative;
  size_t shared_per_block_optin;
  int page_tables, direct_managed, blocks_per_multiprocessor, access_window;
  char rest[312];
};
_Static_assert(sizeof(struct properties) == 1008, "cudaDeviceProp of CUDA 13 has 1,008 bytes");

int cudaGetDeviceProperties(struct properties *p, int index) {
  const struct device *d = standin();
  memset(p, 0, sizeof *p);
  strcpy(p->name, d->name);
  for (int i = 0; i < 16; i++) p->uuid[i] = i;
  p->total_memory = d->memory_bytes;
  p->shared_per_block = attribute(8);
  p->registers_per_block = p->registers_per_multiprocessor = attribute(12);
  p->warp_size = 32;
  p->threads_per_block = 1024;
  for (int i = 0; i < 3; i++) {
    p->block_size[i] = attribute(2 + i);
    p->grid_size[i] = attribute(5 + i);
  }
  p->major = d->major;
  p->minor = d->minor;
  p->texture_alignment = 512;
  p->multiprocessors = d->multiprocessors;
  p->bus_bits = d->bus_bits;
  p->l2_bytes = d->l2_bytes;
  p->threads_per_multiprocessor = d->threads_per_multiprocessor;
  p->shared_per_multiprocessor = d->shared_per_multiprocessor;
  p->shared_per_block_optin = d->shared_per_block_optin;
  p->blocks_per_multiprocessor = d->blocks_per_multiprocessor;
  p->concurrent_kernels = p->unified_addresses = p->cooperative = p->managed = 1;
  return SUCCESS;
}

static __thread int current;
int cudaGetDeviceCount(int *n) {
  *n = 1;
  return SUCCESS;
}
int cudaGetDevice(int *index) {
  *index = current;
  return SUCCESS;
}
int cudaSetDevice(int index) {
  current = index;
  return SUCCESS;
}
int cudaDriverGetVersion(int *version) {
  *version = 13000;
  return SUCCESS;
}
int cudaRuntimeGetVersion(int *version) {
  *version = 13000;
  return SUCCESS;
}
int cudaDeviceGetAttribute(int *value, int which, int index) {
  *value = attribute(which);
  return SUCCESS;
}
int cudaDeviceGetPCIBusId(char *id, int room, int index) {
  snprintf(id, room, "0000:00:00.0");
  return SUCCESS;
}
int cudaDeviceCanAccessPeer(int *can, int from, int to) {
  *can = 0;
  return SUCCESS;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return SUCCESS;
}
const char *cudaGetErrorName(int error) {
  return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : error ? "cudaError" : "cudaSuccess";
}
const char *cudaGetErrorString(int error) {
  switch (error) {
    case SUCCESS: return "no error";
    case INVALID_VALUE: return "invalid argument (stand-in GPU)";
    case OUT_OF_MEMORY: return "out of memory (stand-in GPU)";
    case CAPTURE_FORBIDS_IT:
      return "operation not permitted when stream is capturing (stand-in GPU)";
    default: return "error of the stand-in GPU";
  }
}

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuDeviceGetCount(int *n) { return cudaGetDeviceCount(n); }
int cuDeviceGet(int *device, int index) {
  *device = index;
  return SUCCESS;
}
int cuDeviceGetName(char *name, int room, int device) {
  snprintf(name, room, "%s", standin()->name);
  return SUCCESS;
}
int cuDeviceGetAttribute(int *value, int which, int device) {
  *value = attribute(which);
  return SUCCESS;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  *bytes = standin()->memory_bytes;
  return SUCCESS;
}
int cuGetErrorName(int error, const char **name) {
  *name = cudaGetErrorName(error);
  return SUCCESS;
}
int cuGetErrorString(int error, const char **text) {
  *text = cudaGetErrorString(error);
  return SUCCESS;
}

// There is one context, and it is always there.
static char context;
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **found, int device) {
  *found = &context;
  return SUCCESS;
}
int cuCtxGetCurrent(void **found) {
  *found = &context;
  return SUCCESS;
}
int cuCtxGetDevice(int *device) { return cudaGetDevice(device); }
int cuCtxGetLimit(size_t *value, int which) {
  *value = 0;
  return SUCCESS;
}

// Functions by name: those written here or in rest.c, else one that succeeds and does nothing.
static int nothing(void) { return SUCCESS; }
static void *function(const char *name) {
  void *found = dlsym(RTLD_DEFAULT, name);
  return found ? found : (void *)nothing;
}
int cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version,
                                     unsigned long long flags, int *result) {
  *found = function(name);
  if (result) *result = 0;
  return SUCCESS;
}
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags,
                        int *result) {
  return cudaGetDriverEntryPointByVersion(name, found, version, flags, result);
}
