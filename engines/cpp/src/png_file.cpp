// PNG files by libpng.
#include "picture_file.h"

#include "errors.h"

#ifdef HIGEN_PNG

#include <png.h>

#include <csetjmp>
#include <cstring>
#include <new>
#include <utility>

namespace higen::core {
namespace {

// Owned outside the function that libpng's longjmp returns to, because that function's own objects are not destroyed.
struct Reading {
    const Bytes& file;
    std::size_t at = 0;
    char reason[200] = "";
    std::vector<png_bytep> rows = {};
    Decoded made = {};
};

extern "C" void take(png_structp png, png_bytep to, std::size_t size) {
    auto& own = *static_cast<Reading*>(png_get_io_ptr(png));
    if (size > own.file.size() - own.at) png_error(png, "is truncated");
    std::memcpy(to, own.file.data() + own.at, size);
    own.at += size;
}

extern "C" void fail_png(png_structp png, png_const_charp reason) {
    auto& own = *static_cast<Reading*>(png_get_error_ptr(png));
    std::strncpy(own.reason, reason, sizeof own.reason - 1);
    png_longjmp(png, 1);
}

extern "C" void ignore(png_structp, png_const_charp) {}

void take_exif(png_structp png, png_infop info, Decoded& made) {
#ifdef PNG_eXIf_SUPPORTED
    png_uint_32 size = 0;
    png_bytep data = nullptr;
    if (png_get_eXIf_1(png, info, &size, &data) != 0) made.exif.assign(data, data + size);
#else
    (void)png, (void)info, (void)made;
#endif
}

bool read_header(png_structp png, png_infop info, Reading& own) {
    if (setjmp(png_jmpbuf(png)) != 0) return false;
    png_read_info(png, info);
    own.made.width = png_get_image_width(png, info);
    own.made.height = png_get_image_height(png, info);
    return true;
}

// Read any PNG as 8-bit RGBA without gamma correction, as Pillow does.
bool read_pixels(png_structp png, png_infop info, Reading& own) {
    if (setjmp(png_jmpbuf(png)) != 0) return false;
    png_set_expand(png);
    png_set_scale_16(png);
    png_set_gray_to_rgb(png);
    png_set_add_alpha(png, 0xff, PNG_FILLER_AFTER);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    png_read_image(png, own.rows.data());
    png_read_end(png, info);  // an eXIf chunk may follow the pixels
    take_exif(png, info, own.made);
    return true;
}

}  // namespace

Decoded decode_png(const Bytes& file, const std::string& path) {
    Reading own{file};
    auto* png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &own, fail_png, ignore);
    auto* info = png == nullptr ? nullptr : png_create_info_struct(png);
    struct Free {
        png_structp png;
        png_infop info;
        ~Free() { png_destroy_read_struct(&png, &info, nullptr); }
    } const free{png, info};
    if (info == nullptr) throw std::bad_alloc();
    png_set_user_limits(png, max_picture_side, max_picture_side);
    png_set_read_fn(png, &own, take);
    const auto fail = [&] { fail_request(path + ": cannot be read as a PNG file: " + own.reason); };
    if (!read_header(png, info, own)) fail();
    check_picture_size(path, own.made.width, own.made.height);
    own.made.rgba.resize(4 * own.made.width * own.made.height);
    for (std::size_t y = 0; y < own.made.height; ++y) own.rows.push_back(own.made.rgba.data() + 4 * own.made.width * y);
    if (!read_pixels(png, info, own)) fail();
    return std::move(own.made);
}

}  // namespace higen::core

#endif
