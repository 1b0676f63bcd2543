// The part of the C interface that reads pictures.
#include <cstdlib>
#include <cstring>

#include "c_api.h"
#include "picture_file.h"

using namespace higen::c_api;

higen_status higen_image_open(const char* path, higen_image* image) {
    return guarded([&] {
        require(path, "path");
        require(image, "image");
        const auto read = higen::core::read_picture(path);
        higen_image found = HIGEN_IMAGE_INIT;
        found.height = narrow(read.height);
        found.width = narrow(read.width);
        found.rgb = static_cast<std::uint8_t*>(std::malloc(read.pixels.size()));
        if (found.rgb == nullptr) throw std::bad_alloc();
        std::memcpy(found.rgb, read.pixels.data(), read.pixels.size());
        try {
            store(found, image, "image");
        } catch (...) {
            std::free(found.rgb);
            throw;
        }
    });
}

void higen_image_free(higen_image* image) {
    if (image == nullptr) return;
    std::free(image->rgb);
    image->rgb = nullptr;
}
