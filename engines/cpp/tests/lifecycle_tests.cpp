// Stopping and closing on a real model directory, from several threads: lifecycle_tests MODEL [REPEATS]
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "higen/higen.hpp"

namespace {

std::string directory;
int repeats = 3;

higen_model* opened() {
    higen_model_options options = HIGEN_MODEL_OPTIONS_INIT;
    options.threads = 1;
    options.skip_verification = 1;
    higen_model* model = nullptr;
    CHECK(higen_model_open(directory.c_str(), &options, &model) == HIGEN_OK);
    return model;
}

// Counts steps, and may call back.
struct Watch {
    std::atomic<int> steps = 0;
    std::function<void()> first_step = {};

    higen_callbacks callbacks(higen_token* token = nullptr) {
        higen_callbacks calls = HIGEN_CALLBACKS_INIT;
        calls.user = this;
        calls.token = token;
        calls.on_step = [](void* user, const higen_step*) {
            auto& own = *static_cast<Watch*>(user);
            if (own.steps++ == 0 && own.first_step) own.first_step();
            return 0;
        };
        return calls;
    }

    void wait() const {
        while (steps == 0) std::this_thread::yield();
    }
};

// By default much longer than these tests wait, unless it is stopped.
higen_status generate(higen_model* model, Watch& watch, higen_token* token = nullptr, std::int32_t steps = 100) {
    higen_request request;
    higen_model_info info = HIGEN_MODEL_INFO_INIT;
    if (const auto status = higen_request_init(model, &request); status != HIGEN_OK) return status;
    if (const auto status = higen_model_describe(model, &info); status != HIGEN_OK) return status;
    request.prompt = "a whale";
    request.width = request.height = (steps == 100 ? 32 : 2) * info.size_multiple;
    request.steps = &steps;
    request.step_count = 1;
    const auto calls = watch.callbacks(token);
    return higen_generate(model, &request, &calls);
}

// Every function refuses a handle that was closed.
void check_closed(higen_model* model) {
    higen_request request;
    higen_model_info info = HIGEN_MODEL_INFO_INIT;
    higen_loop_info loop = HIGEN_LOOP_INFO_INIT;
    higen_control_info control = HIGEN_CONTROL_INFO_INIT;
    higen_preset_info preset = HIGEN_PRESET_INFO_INIT;
    std::int64_t id = 0;
    const higen_request* requests[] = {&request};
    CHECK(higen_request_init(model, &request) == HIGEN_ERROR_CLOSED);
    CHECK(higen_last_error() == std::string("the model was closed, or does not come from this library"));
    request = {};
    request.struct_size = sizeof request;
    CHECK(higen_generate(model, &request, nullptr) == HIGEN_ERROR_CLOSED);
    CHECK(higen_generate_batch(model, requests, 1, nullptr) == HIGEN_ERROR_CLOSED);
    CHECK(higen_model_describe(model, &info) == HIGEN_ERROR_CLOSED);
    CHECK(higen_model_loop(model, 0, &loop) == HIGEN_ERROR_CLOSED);
    CHECK(higen_model_control(model, 0, &control) == HIGEN_ERROR_CLOSED);
    CHECK(higen_model_preset(model, 0, &preset) == HIGEN_ERROR_CLOSED);
    CHECK(higen_tokenize(model, "a", &id, 1) == HIGEN_ERROR_CLOSED);
    CHECK(higen_cancel(model) == HIGEN_ERROR_CLOSED);
    CHECK(higen_controls(model) == 0 && higen_model_prompt(model, 0) == nullptr);
    higen_model_close(model);  // a second time: nothing happens
}

}  // namespace

TEST(closing_stops_what_runs) {
    for (int i = 0; i < repeats; ++i) {
        auto* model = opened();
        Watch watches[2];
        higen_status found[2] = {};
        std::vector<std::thread> threads;
        for (int k = 0; k < 2; ++k)
            threads.emplace_back([&, k] { found[k] = generate(model, watches[k]); });
        // At any moment: before the first step, within a step, or after some steps.
        if (i % 3 > 0) watches[0].wait();
        if (i % 3 > 1) watches[1].wait();
        higen_model_close(model);
        const int steps = watches[0].steps + watches[1].steps;
        for (auto& thread : threads) thread.join();
        CHECK(watches[0].steps + watches[1].steps == steps);  // no callback after it
        for (int k = 0; k < 2; ++k)
            CHECK(found[k] == HIGEN_CANCELLED || (found[k] == HIGEN_ERROR_CLOSED && watches[k].steps == 0));
        check_closed(model);
    }
}

TEST(several_threads_close_at_once) {
    for (int i = 0; i < (repeats + 9) / 10; ++i) {
        auto* model = opened();
        Watch watch;
        std::atomic<higen_status> found = HIGEN_OK;
        std::thread worker([&] { found = generate(model, watch); });
        watch.wait();
        std::vector<std::thread> threads;
        for (int k = 0; k < 4; ++k) threads.emplace_back([&] { higen_model_close(model); });
        for (auto& thread : threads) thread.join();
        worker.join();
        CHECK(found == HIGEN_CANCELLED);
        check_closed(model);
    }
}

TEST(closing_inside_of_a_callback_does_not_wait_for_itself) {
    auto* model = opened();
    Watch watch;
    watch.first_step = [&] {
        higen_model_close(model);
        check_closed(model);
    };
    CHECK(generate(model, watch) == HIGEN_CANCELLED);
    CHECK(watch.steps == 1 && higen_last_error() == std::string("cancelled: the model was closed"));
}

TEST(two_callbacks_close_each_others_models) {
    higen_model* models[] = {opened(), opened()};
    Watch watches[2];
    higen_status found[2] = {};
    std::vector<std::thread> threads;
    for (int k = 0; k < 2; ++k)
        threads.emplace_back([&, k] {
            watches[k].first_step = [&, k] {
                watches[1 - k].wait();
                higen_model_close(models[1 - k]);
            };
            found[k] = generate(models[k], watches[k]);
        });
    for (auto& thread : threads) thread.join();
    CHECK(found[0] == HIGEN_CANCELLED && found[1] == HIGEN_CANCELLED);
    for (auto* model : models) check_closed(model);
}

TEST(a_token_stops_its_generation_alone) {
    auto* model = opened();
    for (int i = 0; i < repeats; ++i) {
        higen_token* token = nullptr;
        CHECK(higen_token_create(&token) == HIGEN_OK);
        Watch stopped, other;
        std::atomic<higen_status> found = HIGEN_OK;
        std::thread worker([&] { found = generate(model, stopped, token); });
        if (i % 2 > 0) stopped.wait();  // else cancel at any moment, also before it begins
        CHECK(higen_token_cancel(token) == HIGEN_OK);
        const int steps = stopped.steps;
        higen_token_free(token);
        CHECK(generate(model, other, nullptr, 1) == HIGEN_OK);
        worker.join();
        CHECK(found == HIGEN_CANCELLED || found == HIGEN_ERROR_CLOSED);  // freed before it begins, perhaps
        CHECK(stopped.steps <= steps + 1);                               // stopped within one step
    }
    higen_model_close(model);
}

TEST(a_token_is_cancelled_for_good) {
    auto* model = opened();
    higen_token* token = nullptr;
    CHECK(higen_token_create(&token) == HIGEN_OK);
    Watch watch;
    CHECK(generate(model, watch, token, 1) == HIGEN_OK && higen_token_cancel(token) == HIGEN_OK);
    watch.steps = 0;
    CHECK(generate(model, watch, token, 1) == HIGEN_CANCELLED && watch.steps == 0);
    CHECK(higen_last_error() == std::string("cancelled by its token"));
    higen_token_free(token);
    CHECK(generate(model, watch, token, 1) == HIGEN_ERROR_CLOSED);
    // A token that is freed while its generation runs does not stop it.
    CHECK(higen_token_create(&token) == HIGEN_OK);
    watch.first_step = [&] { higen_token_free(token); };
    CHECK(generate(model, watch, token, 2) == HIGEN_OK);
    higen_model_close(model);
}

TEST(the_class_closes_and_cancels_too) {
    for (int i = 0; i < (repeats + 9) / 10; ++i) {
        higen::Model model(directory);
        higen::Callbacks callbacks;
        callbacks.token.emplace();
        std::atomic<bool> begun = false;
        callbacks.on_step = [&](const higen_step&) { return begun = true; };
        higen::Request request(model, "a whale");
        request.steps({100});
        request->width = request->height = 32 * model.info().size_multiple;
        std::atomic<higen_status> found = HIGEN_OK;
        std::thread worker([&] {
            try {
                (void)model.generate(request, callbacks);
            } catch (const higen::Error& error) {
                found = error.status();
            }
        });
        while (!begun) std::this_thread::yield();
        if (i % 2 > 0)
            model.close();
        else
            callbacks.token->cancel();
        worker.join();
        CHECK(found == HIGEN_CANCELLED);
        model.close();
        try {
            (void)model.info();
            CHECK(false);
        } catch (const higen::Error& error) {
            CHECK(error.status() == HIGEN_ERROR_CLOSED);
        }
    }
}

int main(int argc, char** argv) {
    if (argc < 2 || argc > 3) {
        std::fputs("usage: lifecycle_tests MODEL [REPEATS]\n", stderr);
        return 2;
    }
    directory = argv[1];
    if (argc == 3) repeats = std::atoi(argv[2]);
    return test::run_all();
}
