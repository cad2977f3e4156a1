/* A libnvidia-ml.so.1 that answers from a scenario, so that pynvml itself runs without a GPU.
 *
 * FAKE_NVML names a file of lines `WHO WHAT ANSWER`. WHO is a GPU's index, or `-` for the library; WHAT is the name of an
 * NVML function, with its arguments after colons where it is asked with several; ANSWER is what it gives, several values
 * with spaces between them, or `!N` for the return value N. What no line tells is "not supported" (3). Lines that begin
 * with `#` are notes. scripts/record-nvml writes such a file on a host with GPUs.
 *
 *   - nvmlDeviceGetCount 1
 *   0 nvmlDeviceGetName NVIDIA H200
 *   0 nvmlDeviceGetTotalEccErrors:1:0 2
 *   0 nvmlDeviceGetComputeRunningProcesses 4711 2000000000 4712 1000000
 *   0 lost 12            the GPU answers twelve questions, then falls off the bus (15)
 *   - nvmlInit !hang     this question never comes back
 *
 * Compiled with -DOLD_DRIVER it lacks the functions that drivers before 450 lack. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15, MOST = 512, GPUS = 16 };
typedef unsigned long long u64;

static struct { char who[8], what[80], answer[256]; } lines[MOST];
static int many, asked[GPUS];

static void read_scenario(void) {
  const char *name = getenv("FAKE_NVML");
  FILE *file = name ? fopen(name, "r") : NULL;
  char line[400];
  many = 0;
  memset(asked, 0, sizeof asked);
  while (file && many < MOST && fgets(line, sizeof line, file)) {
    line[strcspn(line, "\n")] = 0;
    lines[many].answer[0] = 0;
    if (line[0] != '#' && sscanf(line, "%7s %79s %255[^\n]", lines[many].who, lines[many].what, lines[many].answer) >= 2)
      many++;
  }
  if (file) fclose(file);
}

/* What a scenario tells, NULL when nothing; *result is what the function must return. */
static const char *answer(const char *who, const char *what, int *result) {
  *result = NOT_SUPPORTED;
  for (int i = 0; i < many; i++) {
    if (strcmp(lines[i].who, who) || strcmp(lines[i].what, what)) continue;
    while (!strcmp(lines[i].answer, "!hang")) sleep(1000);
    *result = lines[i].answer[0] == '!' ? atoi(lines[i].answer + 1) : OK;
    return *result == OK ? lines[i].answer : NULL;
  }
  return NULL;
}

static const char *of_gpu(void *gpu, const char *what, int *result) {
  char who[8];
  const char *left;
  snprintf(who, sizeof who, "%zu", (size_t)gpu - 1);
  left = answer(who, "lost", result);
  if (left && asked[(size_t)gpu - 1]++ >= atoi(left)) return *result = GPU_IS_LOST, NULL;
  return answer(who, what, result);
}

static int text(const char *told, int result, char *into, unsigned int size) {
  if (told) snprintf(into, size, "%s", told);
  return result;
}

int nvmlInitWithFlags(unsigned int flags) {
  int result;
  (void)flags;
  read_scenario();
  answer("-", "nvmlInit", &result);
  return result == NOT_SUPPORTED ? OK : result;
}
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int result) { (void)result; return "an error of the fake library"; }
int nvmlSystemGetDriverVersion(char *into, unsigned int size) {
  int result;
  const char *told = answer("-", "nvmlSystemGetDriverVersion", &result);
  return text(told, result, into, size);
}
int nvmlSystemGetCudaDriverVersion(int *version) {
  int result;
  const char *told = answer("-", "nvmlSystemGetCudaDriverVersion", &result);
  if (told) *version = atoi(told);
  return result;
}
int nvmlDeviceGetCount_v2(unsigned int *count) {
  int result;
  const char *told = answer("-", "nvmlDeviceGetCount", &result);
  if (told) *count = (unsigned int)atoi(told);
  return result;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **gpu) {
  char who[8];
  int result;
  snprintf(who, sizeof who, "%u", index);
  answer(who, "nvmlDeviceGetHandleByIndex", &result);
  if (result != OK && result != NOT_SUPPORTED) return result;
  *gpu = (void *)(size_t)(index + 1);
  return OK;
}
int nvmlDeviceGetMemoryInfo(void *gpu, u64 *memory) { /* total, free, used */
  int result;
  const char *told = of_gpu(gpu, "nvmlDeviceGetMemoryInfo", &result);
  if (told && sscanf(told, "%llu %llu %llu", memory, memory + 1, memory + 2) != 3) return INVALID;
  return result;
}
int nvmlDeviceGetCudaComputeCapability(void *gpu, int *major, int *minor) {
  int result;
  const char *told = of_gpu(gpu, "nvmlDeviceGetCudaComputeCapability", &result);
  if (told && sscanf(told, "%d %d", major, minor) != 2) return INVALID;
  return result;
}
int nvmlDeviceGetTotalEccErrors(void *gpu, int kind, int counter, u64 *count) {
  char what[80];
  int result;
  const char *told;
  snprintf(what, sizeof what, "nvmlDeviceGetTotalEccErrors:%d:%d", kind, counter);
  told = of_gpu(gpu, what, &result);
  if (told) *count = strtoull(told, NULL, 10);
  return result;
}
int nvmlDeviceGetPciInfo_v3(void *gpu, char *info) { /* legacy[16], domain, bus, device, two ids, busId[32] */
  int result;
  const char *told = of_gpu(gpu, "nvmlDeviceGetPciInfo", &result);
  unsigned int place[3];
  if (told && sscanf(told, "%x:%x:%x", place, place + 1, place + 2) != 3) return INVALID;
  if (told) memcpy(info + 16, place, sizeof place);
  return result;
}

#define TEXT(NAME)                                                 \
  int NAME(void *gpu, char *into, unsigned int size) {             \
    int result;                                                    \
    const char *told = of_gpu(gpu, #NAME, &result);                \
    return text(told, result, into, size);                         \
  }
#define NUMBER(NAME)                                               \
  int NAME(void *gpu, unsigned int *value) {                       \
    int result;                                                    \
    const char *told = of_gpu(gpu, #NAME, &result);                \
    if (told) *value = (unsigned int)strtoul(told, NULL, 10);      \
    return result;                                                 \
  }
#define NUMBER_OF(NAME)                                            \
  int NAME(void *gpu, int which, unsigned int *value) {            \
    char what[80];                                                 \
    int result;                                                    \
    const char *told;                                              \
    snprintf(what, sizeof what, "%s:%d", #NAME, which);            \
    told = of_gpu(gpu, what, &result);                             \
    if (told) *value = (unsigned int)strtoul(told, NULL, 10);      \
    return result;                                                 \
  }

TEXT(nvmlDeviceGetName)
TEXT(nvmlDeviceGetUUID)
NUMBER(nvmlDeviceGetPersistenceMode)
NUMBER(nvmlDeviceGetPerformanceState)
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration)
NUMBER(nvmlDeviceGetCurrPcieLinkWidth)
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration)
NUMBER(nvmlDeviceGetMaxPcieLinkWidth)
NUMBER(nvmlDeviceGetRetiredPagesPendingStatus)
NUMBER_OF(nvmlDeviceGetTemperature)
NUMBER_OF(nvmlDeviceGetTemperatureThreshold)

int nvmlDeviceGetCurrentClocksThrottleReasons(void *gpu, u64 *bits) {
  int result;
  const char *told = of_gpu(gpu, "nvmlDeviceGetCurrentClocksThrottleReasons", &result);
  if (told) *bits = strtoull(told, NULL, 0);
  return result;
}

/* The addresses of pages, as many as the answer's number says. */
int nvmlDeviceGetRetiredPages(void *gpu, int cause, unsigned int *count, u64 *pages) {
  char what[80];
  int result;
  unsigned int found, room = *count;
  const char *told;
  snprintf(what, sizeof what, "nvmlDeviceGetRetiredPages:%d", cause);
  told = of_gpu(gpu, what, &result);
  if (!told) return result;
  *count = found = (unsigned int)atoi(told);
  if (!pages || room < found) return found ? INSUFFICIENT_SIZE : OK;
  for (unsigned int i = 0; i < found; i++) pages[i] = 4096ull * (i + 1);
  return OK;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetRemappedRows(void *gpu, unsigned int *corrected, unsigned int *uncorrected, unsigned int *pending,
                              unsigned int *failed) {
  int result;
  const char *told = of_gpu(gpu, "nvmlDeviceGetRemappedRows", &result);
  if (told && sscanf(told, "%u %u %u %u", corrected, uncorrected, pending, failed) != 4) return INVALID;
  return result;
}

struct process { unsigned int pid; u64 memory; unsigned int gpu_instance, compute_instance; };

int nvmlDeviceGetComputeRunningProcesses_v3(void *gpu, unsigned int *count, struct process *into) {
  int result, read = 0;
  unsigned int room = *count, found = 0;
  struct process one = {0};
  const char *told = of_gpu(gpu, "nvmlDeviceGetComputeRunningProcesses", &result);
  if (!told) return result;
  for (; sscanf(told, "%u %llu%n", &one.pid, &one.memory, &read) == 2; told += read, found++)
    if (into && found < room) into[found] = one;
  *count = found;
  return found > room || (found && !into) ? INSUFFICIENT_SIZE : OK;
}
#endif
