# TensorRT's headers and library, as the target tensorrt::tensorrt: TensorRT 10 or newer, or TensorRT for RTX.
#
# TENSORRT_ROOT   a folder with include/ and lib/, an unpacked release archive
# CUDA_HOME       the folder of CUDA; TensorRT's headers include CUDA's headers, and no other part of it is needed

find_path(TensorRT_INCLUDE_DIR NvInfer.h HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES include)
find_library(TensorRT_LIBRARY NAMES tensorrt_rtx libtensorrt_rtx.so.1 nvinfer
    HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES lib lib64)
find_path(TensorRT_CUDA_INCLUDE_DIR cuda_runtime_api.h
    HINTS ${CUDA_HOME} ${CUDAToolkit_ROOT} $ENV{CUDA_HOME} /usr/local/cuda
    PATH_SUFFIXES include targets/x86_64-linux/include targets/aarch64-linux/include)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT
    REQUIRED_VARS TensorRT_LIBRARY TensorRT_INCLUDE_DIR TensorRT_CUDA_INCLUDE_DIR
    REASON_FAILURE_MESSAGE "set TENSORRT_ROOT to an unpacked release, and CUDA_HOME to a CUDA toolkit")

if(TensorRT_FOUND AND NOT TARGET tensorrt::tensorrt)
    add_library(tensorrt::tensorrt UNKNOWN IMPORTED)
    set_target_properties(tensorrt::tensorrt PROPERTIES
        IMPORTED_LOCATION "${TensorRT_LIBRARY}"
        INTERFACE_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR};${TensorRT_CUDA_INCLUDE_DIR}")
endif()
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_LIBRARY TensorRT_CUDA_INCLUDE_DIR)
