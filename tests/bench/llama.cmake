# Read by CMake at llama.cpp's project() (setup-peers.sh): llama-cpp-python always asks for its
# library of program options, templates and downloads, which takes as long to build as all the rest
# and which nothing here uses.
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
