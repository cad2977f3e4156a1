/* A libnvidia-ml.so.1 that answers from environment variables, so that pynvml itself runs without a GPU.
 *
 * FAKE_NVML_INIT   return value of nvmlInit (0 is success)
 * FAKE_NVML_GPUS   one GPU a line: name|uuid|total bytes|used bytes|major|minor|celsius|ECC errors
 *                  an empty number means "not supported"; the name "lost" makes the GPU answer 15 (GPU is lost)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_SUPPORTED = 3, GPU_IS_LOST = 15, FIELDS = 8, MOST = 16, WIDTH = 96 };

static char fields[MOST][FIELDS][WIDTH];
static unsigned int count;

static void parse(void) {
  const char *text = getenv("FAKE_NVML_GPUS");
  memset(fields, 0, sizeof fields);
  count = 0;
  if (!text || !*text) return;
  unsigned int field = 0, place = 0;
  for (; *text && count < MOST; text++) {
    if (*text == '\n') { count++; field = place = 0; }
    else if (*text == '|') { field++; place = 0; }
    else if (field < FIELDS && place + 1 < WIDTH) fields[count][field][place++] = *text;
  }
  count++;
}

static int number(void *device, int field, unsigned long long *value) {
  const char *text = fields[(size_t)device - 1][field];
  if (!*text) return NOT_SUPPORTED;
  *value = strtoull(text, NULL, 10);
  return OK;
}

int nvmlInitWithFlags(unsigned int flags) {
  (void)flags;
  const char *result = getenv("FAKE_NVML_INIT");
  parse();
  return result ? atoi(result) : OK;
}
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int result) { (void)result; return "an error of the fake library"; }
int nvmlSystemGetDriverVersion(char *text, unsigned int size) { snprintf(text, size, "580.65.06"); return OK; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = 13000; return OK; }
int nvmlDeviceGetCount_v2(unsigned int *found) { *found = count; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
  if (!strcmp(fields[index][0], "lost")) return GPU_IS_LOST;
  *device = (void *)(size_t)(index + 1);
  return OK;
}
int nvmlDeviceGetName(void *device, char *text, unsigned int size) {
  snprintf(text, size, "%s", fields[(size_t)device - 1][0]);
  return OK;
}
int nvmlDeviceGetUUID(void *device, char *text, unsigned int size) {
  snprintf(text, size, "%s", fields[(size_t)device - 1][1]);
  return OK;
}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
  int result = number(device, 2, &memory[0]);
  if (result == OK) result = number(device, 3, &memory[2]);
  memory[1] = memory[0] - memory[2];
  return result;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  unsigned long long a, b;
  if (number(device, 4, &a) || number(device, 5, &b)) return NOT_SUPPORTED;
  *major = (int)a;
  *minor = (int)b;
  return OK;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned int *celsius) {
  unsigned long long value;
  (void)sensor;
  if (number(device, 6, &value)) return NOT_SUPPORTED;
  *celsius = (unsigned int)value;
  return OK;
}
int nvmlDeviceGetTotalEccErrors(void *device, int kind, int counter, unsigned long long *errors) {
  /* Only uncorrected (1) and volatile (0) are asked for; anything else would be a bug of ours. */
  return kind == 1 && counter == 0 ? number(device, 7, errors) : NOT_SUPPORTED;
}
