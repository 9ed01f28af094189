/* How long ONNX Runtime takes for a call in plain C, with its inputs and outputs bound once.

   ort_loop MODEL "x INDEX TYPE RANK DIM... FILE" ...
   Each further argument describes an input (i) or output (o) by its place, element type (ONNXTensorElementDataType), shape and,
   for an input, the file of its raw values. Then, for each line "SETTLE CALLS" on standard input: that many calls, of which the
   last CALLS are timed one by one, and a line of their nanoseconds. Built and driven by bench/open_loop.py. */
#include <stdio.h>
#include <time.h>

#include "onnxruntime_c_api.h"

static const OrtApi *api;

static void check(OrtStatus *status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", api->GetErrorMessage(status));
  exit(1);
}

static size_t size_of(int type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return 4;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return 8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return 1;
    default: fprintf(stderr, "element type %d is not provided for\n", type); exit(1);
  }
}

static void bind(OrtSession *session, OrtIoBinding *binding, OrtMemoryInfo *memory, OrtAllocator *allocator, char *text) {
  char kind, file[4096] = "";
  int place, type, rank, used;
  if (sscanf(text, "%c %d %d %d%n", &kind, &place, &type, &rank, &used) != 4) exit(2);
  int64_t shape[8];
  size_t bytes = size_of(type);
  for (int d = 0; d < rank; d++) {
    int more;
    if (sscanf(text + used, "%ld%n", &shape[d], &more) != 1) exit(2);
    used += more;
    bytes *= (size_t)shape[d];
  }
  char *values = calloc(1, bytes), *name;
  OrtValue *value;
  check(api->CreateTensorWithDataAsOrtValue(memory, values, bytes, shape, (size_t)rank, (ONNXTensorElementDataType)type, &value));
  if (kind == 'i') {
    FILE *source = sscanf(text + used, " %4095[^\n]", file) == 1 ? fopen(file, "rb") : NULL;
    if (source == NULL || fread(values, 1, bytes, source) != bytes) { fprintf(stderr, "cannot read %s\n", file); exit(2); }
    fclose(source);
    check(api->SessionGetInputName(session, (size_t)place, allocator, &name));
    check(api->BindInput(binding, name, value));
  } else {
    check(api->SessionGetOutputName(session, (size_t)place, allocator, &name));
    check(api->BindOutput(binding, name, value));
  }
}

static long now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000L + t.tv_nsec;
}

int main(int count, char **words) {
  api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (api == NULL) { fprintf(stderr, "the library is older than the headers\n"); return 1; }
  OrtEnv *env;
  OrtSessionOptions *options;
  OrtSession *session;
  OrtIoBinding *binding;
  OrtMemoryInfo *memory;
  OrtAllocator *allocator;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "loop", &env));
  check(api->CreateSessionOptions(&options));
  check(api->SetIntraOpNumThreads(options, 1));
  check(api->SetInterOpNumThreads(options, 1));
  check(api->SetSessionGraphOptimizationLevel(options, ORT_ENABLE_ALL));
  check(api->AddSessionConfigEntry(options, "session.force_spinning_stop", "1"));
  check(api->CreateSession(env, words[1], options, &session));
  check(api->CreateIoBinding(session, &binding));
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(api->GetAllocatorWithDefaultOptions(&allocator));
  for (int word = 2; word < count; word++) bind(session, binding, memory, allocator, words[word]);
  int settle, calls;
  while (scanf("%d %d", &settle, &calls) == 2) {
    for (int call = -settle; call < calls; call++) {
      long began = now();
      check(api->RunWithBinding(session, NULL, binding));
      long took = now() - began;
      if (call >= 0) printf("%ld ", took);
    }
    printf("\n");
    fflush(stdout);
  }
  return 0;
}
