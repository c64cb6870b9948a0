// Calls of kernels in a row; the width of vectors.
#include <cstdint>

#include "vectors.h"

struct Call {
    void (*kernel)(const void*);
    const void* arguments;
};

extern "C" void replay(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].kernel(calls[i].arguments);
}

extern "C" int64_t lanes() { return LANES; }
extern "C" int64_t wide() { return WIDE; }
