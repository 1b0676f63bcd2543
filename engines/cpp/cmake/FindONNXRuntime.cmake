# ONNX Runtime's headers and library, as the target onnxruntime::onnxruntime.
#
# ONNXRUNTIME_ROOT   a folder with include/ and lib/: an official release archive, or what get_onnxruntime.sh makes
#
# The headers may be older than the library, but never newer: the library supports every API version up to its own.

find_path(ONNXRuntime_INCLUDE_DIR onnxruntime_cxx_api.h
    HINTS ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT}
    PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session)
find_library(ONNXRuntime_LIBRARY NAMES onnxruntime libonnxruntime.so.1
    HINTS ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT}
    PATH_SUFFIXES lib lib64)

# A program that links an installed static library of higen needs no headers.
set(wanted ONNXRuntime_LIBRARY)
if(NOT ONNXRuntime_LIBRARY_ALONE)
    list(APPEND wanted ONNXRuntime_INCLUDE_DIR)
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime
    REQUIRED_VARS ${wanted}
    REASON_FAILURE_MESSAGE "set ONNXRUNTIME_ROOT to a folder with include/ and lib/ (get_onnxruntime.sh makes one)")

if(ONNXRuntime_FOUND AND NOT TARGET onnxruntime::onnxruntime)
    add_library(onnxruntime::onnxruntime UNKNOWN IMPORTED)
    set_target_properties(onnxruntime::onnxruntime PROPERTIES IMPORTED_LOCATION "${ONNXRuntime_LIBRARY}")
    if(NOT ONNXRuntime_LIBRARY_ALONE)
        set_target_properties(onnxruntime::onnxruntime PROPERTIES
            INTERFACE_INCLUDE_DIRECTORIES "${ONNXRuntime_INCLUDE_DIR}")
    endif()
endif()
mark_as_advanced(ONNXRuntime_INCLUDE_DIR ONNXRuntime_LIBRARY)
