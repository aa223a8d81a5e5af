// Measures the layer, the gates, the kernels and the exchange beside what they cannot beat and what
// they should.
//   perseid-bench layer --suite cpu --threads 2
//   perseid-bench layer --device cuda --suite gpu
//   perseid-bench router --device cuda --suite gpu
//   mpirun -np 2 perseid-bench exchange -b 256K -e 256K
#include <malloc.h>
#include <torch/headeronly/version.h>

#include <iostream>

#include "comm/collectives.h"
#include "comm/session.h"
#include "examples/bench/flags.h"
#include "examples/common/device.h"
#include "examples/common/text.h"

namespace perseid::bench {
namespace {

using examples::format_text;

/// Keeps freed memory. By default glibc gives large blocks back to the system at each free, and the
/// next operation pays for zeroed pages again, several times per forward, in every contender.
void keep_freed_memory() {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
  mallopt(M_ARENA_MAX, 1);
}

std::string version_line(kernels::Device device) {
  return format_text("perseid-bench %s | LibTorch %d.%d.%d | %s | %s\n", PERSEID_VERSION,
                     TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR, TORCH_VERSION_PATCH,
                     comm::mpi_version().c_str(), examples::device_text(device).c_str());
}

void run_command(Program& program, kernels::Device device, std::ostream& out) {
  program.layer.device = program.kernel.device = program.limits.device = device;
  if (program.command == "layer") return run_layer_bench(program.layer, out);
  if (program.command == "gates") return run_gates_bench(program.gates, out);
  if (program.command == "swap") return run_swap_bench(program.gates, out);
  if (program.command == "sparse") return run_sparse_bench(program.sparse, out);
  if (program.command == "limits") return run_limits_bench(program.limits, out);
  run_kernel_bench(program.kernel, out);
}

int run_alone(Program& program) {
  comm::SessionOptions one_process;
  one_process.comm = "self";
  return comm::run_session(one_process, [&program](const comm::Group&) {
    const kernels::Device device = examples::find_device(program.device, "perseid-bench");
    std::cout << version_line(device) << "glibc keeps freed memory (mallopt), for all contenders\n";
    run_command(program, device, std::cout);
  });
}

int run_exchange(const Program& program) {
  return comm::run_session(program.session, [&program](const comm::Group& world) {
    ExchangeBenchOptions options = program.exchange;
    options.device = examples::find_device(program.device, "perseid-bench");
    examples::use_device(options.device, world, program.session.launcher);
    if (world.rank() == 0) std::cout << version_line(options.device);
    run_exchange_bench(options, world, std::cout);
  });
}

/// Once for all ranks, not once for each; and no rank ends before rank 0 has spoken.
int end_with(int exit_code, const std::string& text) {
  comm::run_session({}, [&](const comm::Group& world) {
    if (world.rank() == 0) (exit_code == 0 ? std::cout : std::cerr) << text;
    comm::barrier(world);
  });
  return exit_code;
}

int main_of(int argc, char** argv) {
  keep_freed_memory();
  CommandLine command = parse_command_line(argc, argv);
  if (!command.run) return end_with(command.exit_code, command.text);
  return command.program.command == "exchange" ? run_exchange(command.program)
                                               : run_alone(command.program);
}

}  // namespace
}  // namespace perseid::bench

int main(int argc, char** argv) { return perseid::bench::main_of(argc, argv); }
