// Streams, events, and graphs captured from them. All work is over as soon as it is queued; waiting
// for it is counted, and fails inside a capture as it does on a GPU.
#include "standin.h"

static struct stream *streams, default_stream;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long captures;  // going on

// Handles 0, 1 and 2 are the default streams, which cannot be captured.
static struct stream *of(void *handle) { return (size_t)handle > 2 ? handle : &default_stream; }
struct graph *capture_on(void *stream) { return of(stream)->graph; }

void enqueue(enum count what, void *stream) {
  struct graph *graph = capture_on(stream);
  if (graph)
    __atomic_fetch_add(&graph->nodes, 1, __ATOMIC_RELAXED);
  else
    note(what, 1);
}

int cudaStreamCreateWithPriority(void **found, unsigned flags, int priority) {
  struct stream *s = calloc(1, sizeof *s);
  pthread_mutex_lock(&lock);
  s->next = streams;
  streams = s;
  pthread_mutex_unlock(&lock);
  *found = s;
  return SUCCESS;
}
int cudaStreamCreateWithFlags(void **found, unsigned flags) {
  return cudaStreamCreateWithPriority(found, flags, 0);
}
int cudaStreamCreate(void **found) { return cudaStreamCreateWithPriority(found, 0, 0); }
int cudaStreamGetPriority(void *stream, int *priority) {
  *priority = 0;
  return SUCCESS;
}

int cudaStreamSynchronize(void *stream) {
  if (capture_on(stream)) return CAPTURE_FORBIDS_IT;
  note(STREAM_SYNCS, 1);
  return SUCCESS;
}
int cuStreamSynchronize(void *stream) { return cudaStreamSynchronize(stream); }
int cudaStreamQuery(void *stream) { return capture_on(stream) ? CAPTURE_FORBIDS_IT : SUCCESS; }
int cudaDeviceSynchronize(void) {
  if (captures) return CAPTURE_FORBIDS_IT;
  note(DEVICE_SYNCS, 1);
  return SUCCESS;
}
int cuCtxSynchronize(void) { return cudaDeviceSynchronize(); }

// An event recorded in a captured stream draws each stream that waits for it into the capture.
int cudaEventCreate(void **found) {
  *found = calloc(1, sizeof(struct event));
  return SUCCESS;
}
int cudaEventCreateWithFlags(void **found, unsigned flags) { return cudaEventCreate(found); }
int cudaEventRecord(struct event *event, void *stream) {
  event->graph = capture_on(stream);
  return SUCCESS;
}
int cudaEventRecordWithFlags(struct event *event, void *stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
int cudaStreamWaitEvent(void *stream, struct event *event, unsigned flags) {
  if (!event->graph) return SUCCESS;
  if (event->graph->ended || of(stream) == &default_stream) return INVALID_VALUE;
  of(stream)->graph = event->graph;
  return SUCCESS;
}
int cudaEventQuery(struct event *event) { return event->graph ? CAPTURE_FORBIDS_IT : SUCCESS; }
int cudaEventSynchronize(struct event *event) {
  if (event->graph) return CAPTURE_FORBIDS_IT;
  note(EVENT_SYNCS, 1);
  return SUCCESS;
}
int cudaEventElapsedTime(float *milliseconds, struct event *from, struct event *to) {
  *milliseconds = 1.0f;  // time is not modelled; a benchmark divides by it
  return SUCCESS;
}

int cudaStreamBeginCapture(void *stream, int mode) {
  if (of(stream) == &default_stream || capture_on(stream)) return CAPTURE_FORBIDS_IT;
  of(stream)->graph = calloc(1, sizeof(struct graph));
  __atomic_fetch_add(&captures, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}
int cudaStreamEndCapture(void *stream, struct graph **found) {
  struct graph *graph = capture_on(stream);
  if (!graph) return INVALID_VALUE;
  pthread_mutex_lock(&lock);
  for (struct stream *s = streams; s; s = s->next)
    if (s->graph == graph) s->graph = NULL;
  pthread_mutex_unlock(&lock);
  graph->ended = 1;
  __atomic_fetch_add(&captures, -1, __ATOMIC_RELAXED);
  *found = graph;
  return SUCCESS;
}
int cudaStreamIsCapturing(void *stream, int *status) {
  *status = capture_on(stream) != NULL;
  return SUCCESS;
}
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id,
                             struct graph **graph, void **dependencies, void **edges, size_t *n) {
  struct graph *found = capture_on(stream);
  *status = found != NULL;
  if (id) *id = (size_t)found;
  if (graph) *graph = found;
  if (n) *n = 0;
  return SUCCESS;
}
int cudaGraphInstantiateWithFlags(struct graph **found, struct graph *graph,
                                  unsigned long long flags) {
  *found = malloc(sizeof **found);
  **found = *graph;
  return SUCCESS;
}
int cudaGraphInstantiate(struct graph **found, struct graph *graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(found, graph, flags);
}
int cudaGraphGetNodes(struct graph *graph, void **nodes, size_t *n) {
  *n = graph->nodes;
  return SUCCESS;
}
int cudaGraphLaunch(struct graph *graph, void *stream) {
  note(GRAPH_LAUNCHES, 1);
  note(KERNELS_IN_GRAPHS, graph->nodes);
  return SUCCESS;
}
