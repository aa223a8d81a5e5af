// Looks into what a run wrote.
//   train_fashion --gate comet --json runs.jsonl
//   perseid-inspect tree --dot runs.jsonl | dot -Tsvg >tree.svg
#include <CLI/CLI.hpp>
#include <iostream>

#include "comm/session.h"
#include "examples/inspect/tree_dot.h"
#include "kernels/error.h"

namespace perseid::examples {
namespace {

constexpr int kUsageError = 64;

int main_of(int argc, char** argv) {
  std::string run;
  std::optional<int64_t> seed;
  CLI::App app("Looks into what a run wrote.", "perseid-inspect");
  app.require_subcommand(1);
  CLI::App& tree = *app.add_subcommand("tree", "the trees of a COMET gate as a drawing");
  tree.add_option("--dot", run, "file of train_fashion --json; writes a graph for Graphviz")
      ->required()
      ->type_name("RUN");
  tree.add_option("--seed", seed, "the run of this seed; default: the first of a COMET gate");
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help("", CLI::AppFormatMode::All);
    return 0;
  } catch (const CLI::ParseError& error) {
    std::cerr << "[perseid-inspect] " << error.what()
              << "\nHINT: perseid-inspect --help lists commands and flags\n";
    return kUsageError;
  }
  comm::SessionOptions one_process;
  one_process.comm = "self";
  return comm::run_session(one_process, [&](const comm::Group&) {
    std::cout << tree_dot(read_tree_run(run, seed)) << std::flush;
    if (!std::cout) {
      throw IoError(ErrorDetail{"inspect", "file", "standard output", "could not be written"});
    }
  });
}

}  // namespace
}  // namespace perseid::examples

int main(int argc, char** argv) { return perseid::examples::main_of(argc, argv); }
