/* The inner loops of the common merges, fused: from the inputs' raw bytes to the output's in one pass through the caches.
 *
 * Every loop does, element by element, the operations of the torch code that it stands for, in the same order, each rounded as
 * there: the two give the same bits (tests/test_methods_native.py). So compile with -ffp-contract=off; where torch adds
 * with a factor (add_(x, alpha=c)) it uses a fused multiply-add, and so does `fma` here.
 *
 * Inputs and outputs are places: in memory, or in files, which are read and written a WINDOW of elements at a time, so that what
 * was read is still in the second-level cache when it is used. Within, work goes in chunks of CHUNK elements, whose float or double
 * scratch stays in the first-level cache.
 *
 * What can fail returns 1, 0 (numbers that are not finite) or -1 (reading or writing failed: see `struct work`).
 */

#define _FILE_OFFSET_BITS 64
#define _DEFAULT_SOURCE /* mapped pages that are no file's */
#define _DARWIN_C_SOURCE

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BF16, F16, F32, F64 };

#ifndef GEOMERGE_SOURCE
#define GEOMERGE_SOURCE ""
#endif
/* The fingerprint of this file (build.py): a library made of another one is not loaded. */
const char geomerge_source[] = GEOMERGE_SOURCE;

#define CHUNK 256
#define MOST 32 /* inputs of one call */

#include "numbers.h"
#include "mapped.h"
#include "places.h"
#include "functions.h"
#include "span.h"
#include "gram.h"
#include "brackets.h"
#include "sort.h"
#include "random.h"
#include "task_vectors.h"
#include "keys.h"
#include "beside.h"
#include "ranks.h"
#include "pruned.h"
#include "program.h"
#include "divergences.h"
#include "importance.h"
#include "competition.h"
#include "near.h"
#include "agreement.h"
#include "resolvents.h"
