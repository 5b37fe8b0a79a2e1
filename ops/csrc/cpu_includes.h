// What cpu_kernel.h needs. Apart from it, because these must be read before the compiler is switched to another
// instruction set: an inline function of the standard library compiled for AVX-512 could otherwise be the one that
// the linker keeps for every path.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu.h"
