// What metal-cpp's headers use of Apple's framework.
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
