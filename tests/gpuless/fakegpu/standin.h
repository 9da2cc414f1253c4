// What the stand-in's files share, and the few types of CUDA 13's interface that they need.
// Handles are plain pointers, error codes and enumerations plain integers, as in the binary
// interface.
#pragma once
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, CAPTURE_FORBIDS_IT = 900 };

// What is counted (counts.c has the names that Python shows).
enum count {
  STREAM_SYNCS,
  EVENT_SYNCS,
  DEVICE_SYNCS,
  COPIES_TO_HOST,
  COPIES_TO_DEVICE,
  COPIES_ON_DEVICE,
  UNPINNED_COPIES,
  ATEN_LAUNCHES,
  TRITON_LAUNCHES,
  MEMSETS,
  GEMMS,
  GRAPH_LAUNCHES,
  KERNELS_IN_GRAPHS,
  ALLOCATIONS,
  MODULES,
  N_COUNTS
};
void note(enum count what, long times);

// The kind of memory that a pointer leads to (memory.c); the numbers are cudaMemoryType's.
enum place { UNREGISTERED = 0, PINNED = 1, ON_DEVICE = 2 };
enum place place_of(const void *pointer);

// A recorded graph: how many kernels, matmuls, copies and memsets a replay runs.
struct graph {
  long nodes;
};

// A stream or an event belongs to the graph that is being captured, or to none.
struct stream {
  struct graph *graph;
  struct stream *next;
};
struct event {
  struct graph *graph;
};
struct graph *capture_on(void *stream);

// Counts work that was put into a stream: in the graph where the stream is captured.
void enqueue(enum count what, void *stream);

// The device that is stood in for (device.c).
struct device {
  const char *key, *name;
  int major, minor, multiprocessors, threads_per_multiprocessor, blocks_per_multiprocessor;
  int shared_per_block_optin, shared_per_multiprocessor, l2_bytes, bus_bits, clock_khz,
      memory_clock_khz;
  size_t memory_bytes;
};
const struct device *standin(void);

// Counts a launch of a kernel that is known by the name alone (launches.c).
int launch_named(const void *key, const char *name, enum count what, void *stream);

struct dim3 {
  unsigned x, y, z;
};
