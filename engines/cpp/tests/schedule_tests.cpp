// Tests the solvers' tables against tests/schedule_vectors.json, which Python writes: schedule_tests VECTORS.json
// From the library it needs only schedule.cpp.
#include <cstdio>
#include <exception>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "check.h"
#include "schedule.h"

using namespace higen::core;
using Json = nlohmann::json;

namespace {

Json vectors;

NoiseSchedule schedule_of(const Json& json) {
    NoiseSchedule s;
    s.kind = json.value("kind", s.kind);
    s.timesteps = json.value("timesteps", s.timesteps);
    s.beta_start = json.value("beta_start", s.beta_start);
    s.beta_end = json.value("beta_end", s.beta_end);
    s.zero_terminal_snr = json.value("zero_terminal_snr", s.zero_terminal_snr);
    s.sigma_min = json.value("sigma_min", s.sigma_min);
    s.sigma_max = json.value("sigma_max", s.sigma_max);
    s.shift = json.value("shift", s.shift);
    return s;
}

Solver solver_of(const Json& json) {
    Solver s;
    s.name = json.value("name", s.name);
    s.spacing = json.value("spacing", s.spacing);
    s.offset = json.value("offset", s.offset);
    s.final = json.value("final", s.final);
    s.eta = json.value("eta", s.eta);
    s.rho = json.value("rho", s.rho);
    s.original_steps = json.value("original_steps", s.original_steps);
    return s;
}

SolverTable table_of(const Json& entry) {
    return solver_table(schedule_of(entry.at("schedule")), entry.at("prediction").get<std::string>(),
                        solver_of(entry.at("solver")), entry.at("steps").get<std::int64_t>());
}

SolverTable inversion_of(const Json& entry, std::int64_t first) {
    return inversion_table(schedule_of(entry.at("schedule")), entry.at("prediction").get<std::string>(),
                           solver_of(entry.at("solver")), entry.at("steps").get<std::int64_t>(), first);
}

std::string where(const Json& entry, const char* column, std::size_t row) {
    auto name = entry;
    for (const char* numbers : {"t", "A", "B", "C", "alpha", "sigma", "noise", "start_alpha", "start_sigma"})
        name.erase(numbers);
    return name.dump() + ": " + column + "[" + std::to_string(row) + "]";
}

bool near(double a, double b) { return std::abs(a - b) <= 1e-13 * std::abs(b); }

// Compares every column of the entry, within 1e-13; for HiGen's own grids the float32 values must also be equal.
void compare(const SolverTable& table, const Json& entry) {
    const struct {
        const char* name;
        double SolverRow::*value;
    } columns[] = {{"t", &SolverRow::t},
                   {"A", &SolverRow::A},
                   {"B", &SolverRow::B},
                   {"C", &SolverRow::C},
                   {"alpha", &SolverRow::alpha},
                   {"sigma", &SolverRow::sigma},
                   {"start_alpha", &SolverRow::start_alpha},
                   {"start_sigma", &SolverRow::start_sigma}};
    const auto spacing = entry.at("solver").value("spacing", "leading");
    const bool own = spacing == "leading-floor" || spacing == "trailing-ceil";
    CHECK(near(table.initial, entry.at("initial").get<double>()));
    CHECK(table.rows.size() == entry.at("t").size());
    for (const auto& column : columns) {
        if (!entry.contains(column.name)) continue;
        for (std::size_t i = 0; i < table.rows.size(); ++i) {
            const double found = table.rows[i].*column.value, wanted = entry.at(column.name).at(i).get<double>();
            const bool same = near(found, wanted) && (!own || static_cast<float>(found) == static_cast<float>(wanted));
            test::report(same, __FILE__, __LINE__, where(entry, column.name, i) + " is " + Json(found).dump());
        }
    }
    for (std::size_t i = 0; entry.contains("noise") && i < table.rows.size(); ++i)
        test::report(table.rows[i].noise == entry.at("noise").at(i).get<bool>(), __FILE__, __LINE__,
                     where(entry, "noise", i));
}

}  // namespace

TEST(defaults_are_pythons) {
    const Json& defaults = vectors.at("defaults").at(0);
    const Json &s = defaults.at("schedule"), &v = defaults.at("solver");
    const NoiseSchedule schedule;
    CHECK(schedule.kind == s.at("kind") && schedule.timesteps == s.at("timesteps"));
    CHECK(schedule.beta_start == s.at("beta_start") && schedule.beta_end == s.at("beta_end"));
    CHECK(schedule.zero_terminal_snr == s.at("zero_terminal_snr") && schedule.shift == s.at("shift"));
    CHECK(schedule.sigma_min == s.at("sigma_min") && schedule.sigma_max == s.at("sigma_max"));
    const Solver solver;
    CHECK(solver.spacing == v.at("spacing") && solver.offset == v.at("offset") && solver.final == v.at("final"));
    CHECK(solver.eta == v.at("eta") && solver.rho == v.at("rho") && solver.original_steps == v.at("original_steps"));
}

TEST(signal_variance_is_pythons) {
    for (const Json& entry : vectors.at("abar")) {
        const auto abar = alphas_cumprod(schedule_of(entry.at("schedule")));
        const Json& wanted = entry.at("every_37th");
        CHECK(wanted.size() == (abar.size() + 36) / 37);
        for (std::size_t i = 0; i < wanted.size(); ++i) CHECK(near(abar[37 * i], wanted[i].get<double>()));
    }
    NoiseSchedule flow;
    flow.kind = "flow";
    CHECK(test::failure([&] { (void)alphas_cumprod(flow); }).first == HIGEN_ERROR_MANIFEST);
}

TEST(tables_are_pythons) {
    CHECK(vectors.at("tables").size() > 50);
    for (const Json& entry : vectors.at("tables")) compare(table_of(entry), entry);
}

TEST(grids_are_pythons) {
    for (const Json& entry : vectors.at("grids")) compare(table_of(entry), entry);
}

TEST(tails_are_pythons) {
    for (const Json& entry : vectors.at("tails"))
        compare(tail(table_of(entry), entry.at("first").get<std::int64_t>()), entry);
    const auto table = table_of(vectors.at("tails").at(0));
    const auto rows = static_cast<std::int64_t>(table.rows.size());
    for (const std::int64_t first : {std::int64_t{-1}, rows})
        CHECK(test::failure([&] { (void)tail(table, first); }).first == HIGEN_ERROR_REQUEST);
}

TEST(inversions_are_pythons) {
    for (const Json& entry : vectors.at("inversions"))
        compare(inversion_of(entry, entry.at("first").get<std::int64_t>()), entry);
    const Json& entry = vectors.at("inversions").at(0);
    const auto rows = static_cast<std::int64_t>(table_of(entry).rows.size());
    for (const std::int64_t first : {std::int64_t{-1}, rows})
        CHECK(test::failure([&] { (void)inversion_of(entry, first); }).first == HIGEN_ERROR_REQUEST);
}

TEST(refusals_are_pythons) {
    for (const char* list : {"refused", "not_inverted"})
        for (const Json& entry : vectors.at(list)) {
            const auto [status, message] = test::failure([&] {
                (void)(list[0] == 'r' ? table_of(entry) : inversion_of(entry, 0));
            });
            const auto wanted = entry.at("error") == "manifest" ? HIGEN_ERROR_MANIFEST : HIGEN_ERROR_REQUEST;
            test::report(status == wanted && message == entry.at("message"), __FILE__, __LINE__,
                         entry.dump() + ": " + message);
        }
}

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: schedule_tests VECTORS.json\n");
        return EXIT_FAILURE;
    }
    try {
        vectors = Json::parse(std::ifstream(argv[1]));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
        return EXIT_FAILURE;
    }
    return test::run_all();
}
