// Pictures, clips, known frames and masks of a request (higen/images.py, higen/known_frames.py).
#pragma once

#include <set>
#include <string>

#include "request.h"

namespace higen::core {

// The control that an entry of the request names. Throws a request error for an unknown control
// and for one that is named twice.
[[nodiscard]] const Control& control_of(const Manifest& manifest, const char* name, std::set<std::string>& named);

// Read the pictures of a request with known size and frames. Warns of a known frame, mask or map of another size.
// Throws a request error.
void take_pictures(const Manifest& manifest, const higen_request& given, Request& request, const Tokenizer::Warn& warn,
                   std::set<std::string>& named);

// Refuse known frames and maps that no loop of the request takes, and a mask without known frames. Throws a request
// error.
void check_known(const Manifest& manifest, const Request& request);

}  // namespace higen::core
