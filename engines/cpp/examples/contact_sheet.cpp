// The C++ interface, with a preview of the steps: contact_sheet MODEL "PROMPT" SHEET.ppm [STEPS [SIZE [SECONDS]]]
//
// Writes the frames of a video side by side, and prints how bright the estimate is after each step. After SECONDS it
// cancels the generation with a token, from another thread.
#include <chrono>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <future>
#include <iostream>
#include <numeric>
#include <vector>

#include <higen/higen.hpp>

namespace {

bool show(const higen_step& step) {
    std::vector<std::uint8_t> rgb(static_cast<std::size_t>(step.frames * step.width * step.height) * 3);
    higen::check(higen_step_preview(&step, rgb.data(), rgb.size()));
    const auto sum = std::accumulate(rgb.begin(), rgb.end(), std::uint64_t{0});
    std::cout << step.loop << ' ' << step.index + 1 << '/' << step.total << ": mean " << sum / rgb.size() << '\n';
    return true;  // false stops the work
}

void save(const higen::Video& video, const char* path) {
    std::ofstream file(path, std::ios::binary);
    file << "P6\n" << video.count * video.width << ' ' << video.height << "\n255\n";
    const auto row = static_cast<std::size_t>(video.width) * 3;
    for (std::size_t y = 0; y < static_cast<std::size_t>(video.height); ++y)
        for (std::size_t f = 0; f < static_cast<std::size_t>(video.count); ++f)
            file.write(reinterpret_cast<const char*>(video.rgb.data()) +
                           static_cast<std::ptrdiff_t>((f * static_cast<std::size_t>(video.height) + y) * row),
                       static_cast<std::streamsize>(row));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4) return 2;
    try {
        higen::Model model(argv[1]);
        std::cout << model.info().name << '\n';
        higen::Request request(model, argv[2]);
        if (argc > 4) request.steps({std::atoi(argv[4])});
        if (argc > 5) request->width = request->height = std::atoi(argv[5]);
        higen::Callbacks callbacks;
        callbacks.on_step = show;
        callbacks.on_warning = [](const std::string& message) { std::cerr << message << '\n'; };
        callbacks.token.emplace();
        auto video = std::async(std::launch::async, [&] { return model.generate(request, callbacks); });
        const std::chrono::seconds patience(argc > 6 ? std::atoi(argv[6]) : 3600);
        if (video.wait_for(patience) == std::future_status::timeout) callbacks.token->cancel();
        save(video.get(), argv[3]);  // throws if it was cancelled
        return 0;
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
