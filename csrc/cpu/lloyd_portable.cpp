#define PYCOMPRESS_LEVEL portable
#include "vec_portable.h"
//
#include "lloyd.h"
#include "seeding.h"
